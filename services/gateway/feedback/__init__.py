"""Answers that may be corrected, and what is learnt from their corrections (LEMIX_FEEDBACK=on).

answers    an answer as it is remembered, and what corrections make of it; pure
recording  collects an answer while it is sent
batches    corrections as training batches, and how those stand; pure
store      what outlives the gateway: answers, feedback, batches
publisher  publishes batches, and follows what becomes of them
service    what the routes use
objects    what the API takes and shows
"""
