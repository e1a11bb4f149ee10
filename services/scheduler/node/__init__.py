"""The scheduler's knowledge of one node, and the future that follows from it.

node_model       what has happened there and what is placed there; asked by policies, told by events
  iteration_queue  the iterations: on their way, and to be formed from what waits
  now_running      what each stage does at this moment
  prediction       the future, and what one asks it
    list_schedule    list scheduling of everything known (`known_work`)
  prediction_check whether the future still is what was predicted
"""
