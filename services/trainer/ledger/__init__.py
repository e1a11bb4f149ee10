"""Each batch is used once, or rejected once, whatever crashes.

ledger           which batches each node's versions contain, and what of it is durable; pure
pending_batches  the batches that are not durable yet
fates            keeps the book of what becomes of batches
progress         tells publishers what becomes of their batches
rejections       batches that are not used, and why
"""
