"""Token batches in, embeddings out.

Read in this order: texts, words and tokenizer (texts to ids); output_spec (what comes out); pretrained and own_model (a
model by name, and the encoder's copy of it); attention, layers, pooling and forward (one forward); layer_modules,
kernels and fused (the same forward, faster); freezing, encoder and upper.
"""
