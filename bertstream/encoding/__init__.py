"""Token batches in, embeddings out.

Read in this order: tokenizer and cutting (texts to ids); output_spec (what comes out); sentence_folder, sentence_head
and vocabulary (what a model's folder says, and whether its tokenizer fits); pretrained and own_model (a model by name,
and the encoder's copy of it); attention, layers, pooling and forward (one forward); freezing, calibrating, encoder and
upper.
"""
