"""The durable side of training: what stages have written becomes a checkpoint, and what a run goes on from.

checkpointing   has stages load and write; makes durable what they have written, removes what is too old
  files           the folders on the disk (`adapter_file`: where an adapter trains)
  manifests       what they say of batches and versions; pure
  retention       which are kept; pure
  newest          which one each node goes back to; pure
  verdicts        what a guard has found out about versions
rollbacks       nodes go back to an older one for good
  rollback_files  so that it is done wherever the trainer dies
"""
