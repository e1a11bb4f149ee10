"""The scheduler's knowledge of one node, and the future that follows from it.

timeline        what has happened there and what is placed there; asked by policies, told by events
  lineup          the iterations: on their way, and to be formed from what waits
  now_running     what each stage does at this moment
  prediction      the future, and what one asks it
    course          list scheduling of everything known (`known_work`)
  agreement       whether the future still is what was predicted
"""
