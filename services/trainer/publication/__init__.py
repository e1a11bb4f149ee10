"""Which weights versions serve: what has not forgotten too much.

publishing   which versions stages keep, and which one they serve; pure
  kept_versions     how each stands: candidate, serving, retired; pure
  evaluation_turns  when which one is evaluated; pure
  loss_limits       how bad one may be; pure
evaluator    has nodes score examples (`evaluation`: one pass; pure)
  samples    what the model wrote itself before it learnt: a guard that needs no file; pure
               (`samples_file`: on the disk)
  openings   prompts for that; pure
  held_out   examples from a file
  hold_out   examples that the run holds out by itself, on the disk (`stored_example`)
losses       what came of it
agreement    whether what serves is what trains; pure
"""
