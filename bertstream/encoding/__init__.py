"""Token batches in, embeddings out.

Read in this order: texts, words, cutting, backend and tokenizer (texts to ids); output_spec (what comes out);
sentence_folder, sentence_head and vocabulary (what a model's folder says, and whether its tokenizer fits); pretrained,
model_state and own_model (a model by name, and the encoder's copy of it); attention, layers, pooling, forward and
row_forward (one forward, and its rows); layer_modules, model_guard, kernels and fused (the same forward, faster); probe
and self_test (which of them is right); freezing, calibrating, upper, finite, text_forward and encoder; spans (which
characters a row is of).
"""
