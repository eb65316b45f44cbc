"""Token batches in, embeddings out.

Read in this order: tokenizer (texts to ids); output_spec (what comes out); pretrained and own_model (a model by name,
and the encoder's copy of it); attention, layers, model_state, pooling and forward (one forward); self_test (how texts may share a forward); freezing,
encoder and upper.
"""
