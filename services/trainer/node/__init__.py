"""The trainer's decisions for one node. Pure: events in, actions out.

training        the node's life: closed, restoring, open; what to feed and when to step
  members         its stages, and which of them live
  saves           when it saves, and how far a checkpoint has come (`save`: one of them)
actions         what can come of that
"""
