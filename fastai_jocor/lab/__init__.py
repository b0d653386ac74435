"For experiments: data sets, runs, grids, reports, command lines"
import warnings

# fastai uses what torch has deprecated, and every command and every worker would begin with a warning
warnings.filterwarnings('ignore', '.*torch.jit.script.*deprecated', FutureWarning)
