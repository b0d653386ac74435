"For experiments: data sets, runs, grids, reports, command lines"
import warnings

with warnings.catch_warnings(): # fastai uses what torch has deprecated, and every command would begin with a warning
    warnings.filterwarnings('ignore', '.*torch.jit.script.*deprecated', FutureWarning)
    import fastai.vision.all
