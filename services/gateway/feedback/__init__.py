"""Answers that may be corrected, and what is learnt from their corrections (LEMIX_FEEDBACK=on).

answers         an answer as it is remembered, and the lessons of a correction; pure
batches         lessons as training batches, and how those stand; pure
recording       collects an answer while it is sent
answer_memory   remembers it
lesson_check    whether a correction can be learnt from
database        the file below the three stores: answer_store, feedback_store, batch_store
publisher       publishes batches, and follows what becomes of them
service         what the routes use
objects         what the API takes and shows
"""
