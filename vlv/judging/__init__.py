"""
How well captions fit their images, by the model itself. A caption passes through four modules:

    pairs.py    finds images and their captions; `vlv.captioning` reads them, works in batches, and keeps the rows
    judge.py    batches of images and captions -> scores; windows.py reads captions with the decoder's text encoder
    best_of.py  takes the best of several captions that were just written
    keeping.py  copies the best pairs into a new folder; sheet.py shows the worst and the best
"""
