"""Pictures in, features out, with no protocol around it.

`predictor` runs the encoder: `preprocess` decodes a picture and lays it into the model's input by
its `placement`, `batcher` groups inputs, `devices` picks and speeds up, `outputs` computes what
`options` ask for; `timeline` notes the phases. `reconstructor` predicts hidden patches.
"""
