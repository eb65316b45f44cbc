"""Token batches in, embeddings out.

Read in this order: tokenizer (text to ids); pretrained and autotune (loading); attention, layers, pooling and forward
(one forward); encoder and upper.
"""
