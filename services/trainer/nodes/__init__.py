"""The nodes as the trainer drives them.

stage_listener  takes in what stages say, and lets time pass
node_training   a node's life: closed, restoring, open; what to feed and when to step; pure
  members         its stages, and which of them live; pure
  placed_batches  the batches that it has; pure
  saves           when it saves, and how far a checkpoint has come (`save`: one of them); pure
  decisions       what can come of an event; pure
runner          carries decisions out: messages, the ledger, what takes time
learning_rate   the rate of each batch; pure
ask_all         asks every stage of a node the same
"""
