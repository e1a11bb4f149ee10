"""From messages of the durable stream to batches on nodes.

batch_flow    reads the stream and asks the scheduler for nodes
reading       a message becomes a batch that can be fed, or the reason why not
data          the form of a batch's body
microbatches  cuts a batch into the parts that move through a pipeline; pure
"""
