"""Four published architectures, small, each written plainly in torch, Keras and flax.nnx: what the hand-off moves.

`data.py` has what they are trained on and `on_torch.py`, `on_keras.py` and `on_nnx.py` the models, each with a trainer;
but the ViT, with its trainer and blocks, which the demo has too, is in `ada2ms/demo`.
They are the same models where the frameworks' defaults differ only since the defaults are not taken: the epsilons of
normalisations, momentum of BatchNorm, GELU by erf and padding of strided convolutions are spelled out.
"""
