"""One network, one set of weights and batches, trained on real data in every framework.

`digits.py` makes the data, the batches and the initial weights; `on_torch.py`, `on_keras.py` and `on_jax.py` hold the
same network in each framework, trained by that framework's own autodiff; `run.py` trains and compares; `report.py`
shows what it found. `vit.py` hands a Vision Transformer from framework to framework, and `vit_on_torch.py`,
`vit_on_keras.py` and `vit_on_nnx.py` hold it in each.
"""
