"""
Captions for whole collections. A picture passes through four modules:

    sources.py    finds the pictures: files, parquet, WebDataset archives, `datasets`
    engine.py     reads them in worker processes ahead of the model; ray_engine.py does this on a Ray cluster,
                  and vllm_engine.py writes the captions with vLLM
    captioner.py  pixels -> captions, in batches that fit into memory; decoding.py has the settings of the search
    sink.py       writes the captions: to journal.py during the run, to outputs/ at its end
"""
