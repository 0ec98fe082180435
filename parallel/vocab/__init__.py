"""The vocabulary cut by rows over pipeline ranks: which rows each has, the embedding lookup, the output head.

Pure tensor code: who sends what to whom is the pipeline's. Must not know: process groups, schedules, parameters' units.
Source: Yeung et al. 2024, arXiv:2411.05288.
"""
