"Sentences and a small text learner"
import numpy as np, pandas as pd
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, set_seed, text_classifier_learner, TextDataLoaders
from fastai_jocor.noise import Symmetric

GOOD = 'great lovely superb wonderful delightful'.split()
BAD = 'awful boring dull terrible poor'.split()
OTHER = 'the film story acting plot music was very a and with its end'.split()

def reviews(
    n, # Number of sentences
    share=.15 # Of wrong labels
): # A frame with `text`, `label` and `wrong`
    "Made-up reviews, some with a wrong label"
    rng = np.random.default_rng(0)
    true = rng.integers(0, 2, n)
    words = [[*rng.choice(GOOD if y else BAD, 3), *rng.choice(OTHER, 6)] for y in true]
    given = Symmetric(share).corrupt(true, 2)
    text = [' '.join(rng.permutation(o)) for o in words]
    return pd.DataFrame(dict(text=text, label=np.array(['bad','good'])[given], wrong=given != true))

def review_learner(df, path):
    "A small LSTM with random weights on `reviews`"
    set_seed(0)
    dls = TextDataLoaders.from_df(df, path=path, text_col='text', label_col='label', valid_pct=.2, seed=0, bs=16)
    config = {**awd_lstm_clas_config, 'emb_sz': 40, 'n_hid': 60, 'n_layers': 2}
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, path=path)
