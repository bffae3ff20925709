"""
Captions for whole collections. A picture passes through four parts:

    sources.py    where pictures come from: files, parquet, WebDataset archives, `datasets`
    engine.py     worker processes that read them ahead of the model; ray_engine.py does so on a Ray cluster
    captioner.py  pixels -> captions, in batches that fit into memory; decoding.py: the settings of the search
    sink.py       where captions go: journal.py during the run, outputs/ at its end
"""
