"""The items that small-loss selection rejects: ways to use them, against leaving them out.

    python benchmarks/rejected.py --path FOLDER             # all: 42 runs of 1 to 2 minutes
    python benchmarks/rejected.py --path FOLDER --epochs 16 --ways balance --noise symmetric:0.8
    jocor_report benchmarks/results/rejected

FOLDER holds MNIST/raw. MNIST, the papers' perceptron, three peers, co_lambda 0.95, the papers' schedule over 40 epochs.
`balance` is `JoCorCallback(balance=0.5)`. The others set in when the forget rate has risen to the end, and grow to
their full weight over as many epochs as the rise took:

- `contrast`: cross-entropy of the kept items, contrast of all;
- `pseudo`: a rejected item on which all peers agree, with a mean probability above 0.95, counts with this class;
- `relabel`: so does a kept item on which they agree, in the place of its given label;
- `ema`: the step is as it was, but the weights' moving average (0.999 a step) is validated.
"""
import itertools, torch
from pathlib import Path
from fastcore.script import call_parse
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fastai_jocor.all import *
from fastai_jocor.lab.config import Method, RunConfig, methods
from fastai_jocor.lab.grid import run_grid
from fastai_jocor.losses import contrasts, joint_loss, n_terms
from fastai_jocor.events import Part

RESULTS = Path(__file__).resolve().parent/'results'
USES = ('contrast','pseudo','relabel','ema')
WAYS = (*USES,'balance','balance+relabel')

class AverageWeights(Part):
    "Validate with the moving average of the weights"
    order = -5.5
    def __init__(self, owner, decay):
        super().__init__(owner)
        self.decay,self.avg,self.saved = decay,None,None
    def before_train(self):
        if self.avg is not None: return
        self.avg = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.saved is not None: self.avg.load_state_dict(self.saved)
    def after_step(self): self.avg.update_parameters(self.model)
    def before_validate(self): self.own,self.learn.model = self.learn.model,self.avg.module.eval()
    def after_validate(self): self.learn.model = self.own

class UseRejectedCallback(JoCorCallback):
    "JoCoR with one of the `USES` of the rejected items"
    def __init__(self, use='pseudo', threshold=.95, decay=.999, **kwargs):
        super().__init__(rule='schedule', **kwargs)
        if use not in USES: raise ValueError(f"use={use!r} must be one of {', '.join(USES)}")
        self.use,self.threshold = use,threshold
        self.average = AverageWeights(self, decay) if use == 'ema' else None
        if self.average: self.parts.append(self.average)

    def state_dict(self):
        state = super().state_dict()
        return state if self.average is None else state | dict(average=self.average.avg.state_dict())

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.average is not None: self.average.saved = state['average']

    @property
    def log_probs(self): return self.selection.log_probs

    def batch_loss(self, logits, targ, R):
        loss,kept,losses = super().batch_loss(logits, targ, R)
        weight = min(1., max(0., (self.before+self.epoch-self.gradual)/max(self.gradual, 1)))
        if weight and self.use in ('pseudo','relabel'): loss = self.with_votes(logits, losses, kept, weight)
        if weight and self.use == 'contrast':
            scale = self.lam*len(logits)/n_terms(len(logits), self.contrast)
            apart = scale*contrasts[self.contrast](self.log_probs)
            loss = loss + weight*(apart.mean()-apart[kept].mean())
        return loss,kept,losses

    def with_votes(self, logits, losses, kept, weight):
        "Average the losses of the kept items and, weighed, those of the sure items under the peers' common vote"
        best = self.log_probs.detach().argmax(-1)
        prob,vote = self.log_probs.detach().exp().mean(0).max(-1)
        sure = (best == best[0]).all(0) & (prob > self.threshold)
        given = torch.zeros_like(prob).index_fill_(0, kept, 1.)
        voted = weight*(sure if self.use == 'relabel' else sure & (given == 0)).float()
        if self.use == 'relabel': given = given*(1-voted)
        own = joint_loss(logits, vote, self.lam, self.contrast, log_probs=self.log_probs)
        return (given*losses + voted*own).sum()/(given+voted).sum()

methods['use_rejected'] = Method(UseRejectedCallback, paper=methods['jocor'].paper)

def fields(way):
    "Fields of `RunConfig` for one of the `WAYS`"
    *balance,use = way.split('+') if way != 'balance' else (way,None)
    options = dict(balance=.5) if balance else {}
    return dict(method='use_rejected', options=options | dict(use=use)) if use else dict(options=options)

@call_parse
def main(
    path:str=None, # Folder of the data
    epochs:int=40, # Epochs of each run
    seeds:str='0-2', # Seeds, as a range or one
    noise:str='symmetric:0.8,asymmetric:0.4', # Noises
    ways:str=','.join(WAYS), # Ways to compare with leaving the rejected items out
    out:str=str(RESULTS/'rejected'), # Folder of the results
    n_jobs:int=-1 # Runs side by side; -1 for one a core
):
    "Do the runs that are not done yet"
    a,*b = map(int, seeds.split('-'))
    base = vars(RunConfig('mnist', k=3, co_lambda=.95, epochs=epochs))
    several = itertools.product(range(a, (b or [a])[0]+1), noise.split(','), ({}, *map(fields, ways.split(','))))
    run_grid([RunConfig(**base | dict(noise=n, seed=s) | way) for s,n,way in several], out, path, n_jobs)
