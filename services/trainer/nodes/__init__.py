"""The nodes as the trainer drives them.

stage_listener  takes in what stages say, and lets time pass
node_training   a node's life: closed, restoring, open; pure
  members         its stages, and which of them live; pure
  node_work       what it does while it is open; pure
    batch_steps     feeds its batches and orders their steps (`placed_batches`: how far each is); pure
    saves           when it saves, and how far a checkpoint has come (`save`: one of them); pure
  decisions       what can come of an event; pure
rules           for every node; pure
runner          carries decisions out
  stage_orders    sends stages what they are to do
  learning_rate   the rate of each batch; pure
weights_checks  has nodes show that they serve what they train
ask_all         asks every stage of a node the same
"""
