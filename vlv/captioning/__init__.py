"""
Captions for whole collections, in four rooms that a picture passes through:

    sources.py    where pictures come from: files, parquet, WebDataset archives, `datasets`
    engine.py     reading them ahead of the model in worker processes, on this machine or as Ray Data actors
    captioner.py  pixels -> captions, in batches that fit into memory; decoding.py: what the captions are like
    sink.py       where captions go: journal.py keeps what is done, outputs/ holds what it becomes at the end
"""
