"""The nodes as the trainer drives them.

stage_listener  takes in what stages say, and lets time pass
node_training   one node: takes in what happens, and decides; pure
  node_life       closed, restoring or open, and when it may be restored; pure
    members         its stages, and which of them live; pure
  stall_watch     notices that a report is missing; pure
  node_work       what it does while it is open; pure
    batch_gate      whether further batches may begin; pure
    batch_steps     feeds its batches and orders their steps (`placed_batches`: how far each is); pure
    saves           how far a checkpoint has come (`save`: one of them); pure
      save_schedule   when there is one; pure
    weights_merge   its part in a merge; pure
  decisions       what can come of an event; pure
rules           for every node; pure
runner          carries decisions out
  stage_orders    sends stages what they are to do
  learning_rate   the rate of each batch; pure
weights_checks  has nodes show that they serve what they train
ask_all         asks every stage of a node the same
"""
