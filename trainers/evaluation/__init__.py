"""Scores of an encoder: probes on its pooled features, heads trained on its feature maps.

A task is a function from an encoder, a `score.Setting` and its options to a `score.Score`. Each
package imports from those below it alone:

    running                             the running probe of a training
    measure                             a score in the process that has trained the encoder
    tasks, load_head, results           names of the tasks; trained heads; where scores are written
    segmentation, detection, probes     the tasks
    heads                               views, training loop and files of a head on feature maps
    annotations, features               labelled pictures; features of a dataset
    splits                              pictures to learn from and to score on
    score, charts, confusion            what tasks are told and give; charts; confusion matrices
"""
