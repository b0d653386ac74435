"""Past JoCoR: do common votes, early-learning regularisation, mixup, a cascade or two views beat the default?

    python benchmarks/beyond.py --path FOLDER               # all rows that are missing
    python benchmarks/beyond.py --path FOLDER --part large  # 50,000 features
    python benchmarks/beyond.py --path FOLDER --part views  # images that are turned at random
    python benchmarks/beyond.py --path FOLDER --part whole  # all of MNIST, four of five labels wrong
    python benchmarks/beyond.py --summary-only

FOLDER and the data are those of everyday.py, whose learners are trained here, too; no method is told a noise rate.
Each row of results/beyond.csv is one run. Rows that are there are not run again. With three peers each:

- `default` is `JoCorCallback(k=3)`;
- `votes` is `JoCorCallback(k=3, plus='votes')`;
- `early` is `JoCorCallback(k=3, plus='early')`: early-learning regularisation (Liu et al. 2020);
- `mixup`: the kept items are mixed with one another after selection (Zhang et al. 2018), in a second forward pass;
- `cascade`: the first peer trains on all items, the second where the first one predicts the label, the third where
  the second one does (after CUFIT, Yu et al. 2024, whose first network is a probe on the body, as here on features);
- `right_only`: three plain networks on the items whose label is right, averaged, for as many steps: what the best
  selection could reach;
- `turned` and `turned_early`: `default` and `early` on images that are turned, zoomed and warped at random;
- `views`: items are selected by the image as it is, and networks trained on a turned one, in a second forward pass
  (weak selects, strong trains; after FixMatch, Sohn et al. 2020, and Nishi et al. 2021).
"""
import os, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import *
from fastai_jocor.all import JoCorCallback
from fastai_jocor.untold import hide
from fastai_jocor.losses import peer_log_probs
from fastai_jocor.per_sample import first_output, plain
import everyday
from everyday import Cell, Data, do_run, KEY, Method, rows, tables
from everyday_data import *

FILE = Path(__file__).resolve().parent/'results'/'beyond.csv'

class MixKeptCallback(JoCorCallback):
    "The default, trained on mixtures of kept items"
    def __init__(self, alpha=1., **kwargs):
        super().__init__(rule='evidence', **kwargs)
        self.share = torch.distributions.Beta(alpha, alpha)

    def batch_loss(self, logits, targ, R):
        loss,times,losses = super().batch_loss(logits, targ, R)
        s,x = self.selection,self.xb[0]
        if self.finding: return loss, times, losses
        other = torch.multinomial(times, len(targ), replacement=True)
        a = self.share.sample((len(targ),)).to(x)
        a = torch.maximum(a, 1-a)
        b = a.view(-1, *[1]*(x.ndim-1))
        mixed = plain(first_output(self.model(b*x+(1-b)*x[other])))
        hidden = s.evidence.hidden[s.idx]
        shown = hide(hide(mixed, hidden), hidden[other])
        lp = peer_log_probs(shown)
        own,others = (self.joint_losses(shown, lp, y)[1] for y in (targ, targ[other]))
        return (times*(a*own+(1-a)*others)).sum()/times.sum(), times, losses

class CascadeCallback(JoCorCallback):
    "Each peer trains on the items whose label the peer before it predicts, and the last one is the model"
    def __init__(self, **kwargs): super().__init__(rule='evidence', **kwargs)

    def batch_loss(self, logits, targ, R):
        loss,times,losses = super().batch_loss(logits, targ, R)
        if self.finding: return loss, times, losses
        own = torch.stack([F.cross_entropy(o, targ, reduction='none') for o in plain(logits)])
        kept = torch.ones_like(own)
        kept[1:] = (logits[:-1].argmax(-1) == targ).float()
        return ((kept*own).sum(1)/kept.sum(1).clamp_min(1)).sum(), kept[-1], own[-1]

    def after_fit(self):
        "From now on, the mean of the peers' probabilities is that of the last one"
        super().after_fit()
        peers = list(self.model.peers)
        for o in [] if self.finding else peers[:-1]: o.load_state_dict(peers[-1].state_dict())

def turned(x):
    "Images, each turned, zoomed and warped at random; float tensor of shape (N, channels, H, W)"
    tfms = Pipeline(aug_transforms(do_flip=False, max_rotate=15, max_zoom=1.15, max_lighting=0, p_affine=1.))
    tfms.split_idx = 0
    return plain(tfms(TensorImage(plain(x))))

class TurnedCallback(JoCorCallback):
    "The default on turned images"
    def before_batch(self): self.learn.xb = (turned(self.xb[0]),)

class ViewsCallback(JoCorCallback):
    "The default, which selects by images as they are, and trains on turned ones"
    def __init__(self, **kwargs): super().__init__(rule='evidence', **kwargs)

    def batch_loss(self, logits, targ, R):
        loss,times,losses = super().batch_loss(logits, targ, R)
        s = self.selection
        if self.finding: return loss, times, losses
        shown = hide(plain(first_output(self.model(turned(self.xb[0])))), s.evidence.hidden[s.idx])
        own = self.joint_losses(shown, peer_log_probs(shown), targ)[1]
        return (times*own).sum()/times.sum(), times, losses

ways = dict(default=Method(callback=lambda tau: JoCorCallback(k=3)),
            votes=Method(callback=lambda tau: JoCorCallback(k=3, plus='votes')),
            early=Method(callback=lambda tau: JoCorCallback(k=3, plus='early')),
            mixup=Method(callback=lambda tau: MixKeptCallback(k=3)),
            cascade=Method(callback=lambda tau: CascadeCallback(k=3)),
            right_only=Method(nets=3, right=True),
            turned=Method(callback=lambda tau: TurnedCallback(k=3)),
            turned_early=Method(callback=lambda tau: TurnedCallback(k=3, plus='early')),
            views=Method(callback=lambda tau: ViewsCallback(k=3)))
on_features = 'default', 'votes', 'early', 'mixup', 'cascade', 'right_only'
on_images = 'default', 'turned', 'turned_early', 'views'
everyday.methods.update(ways)
tables['features10k'] = Data(features10k, feature_learner, 128, [], [])
tables['mnist60k'] = Data(partial(mnist, n=60000), image_learner, 128, [], [])

noises = 'symmetric 80', 'symmetric 50', 'worse', 'asymmetric 40', 'clean'
cells = dict(small=[Cell('features10k', o, 10, 3e-3) for o in noises]
             + [Cell('clothing', o, 15, 3e-3) for o in ('symmetric 60','symmetric 30','asymmetric 30')]
             + [Cell('mnist', 'symmetric 80', 10, 3e-3)],
             large=[Cell('features', o, 10, 3e-3) for o in noises],
             views=[Cell('mnist', 'symmetric 80', *o) for o in ((10, 3e-3), (30, 3e-3))]
             + [Cell('mnist', o, 10, 3e-3) for o in ('symmetric 50','asymmetric 40')],
             whole=[Cell('mnist60k', 'symmetric 80', 30, 3e-3)])

def summary(df):
    "Mean accuracy in per cent, how far each way is from the default in the same seeds, and seeds"
    acc = 100*df.pivot_table(index=[*KEY[:4],'seed'], columns='method', values='accuracy', sort=False)
    gain = acc.sub(acc.default, axis=0).drop(columns='default').add_prefix('Δ ')
    cell = acc.join(gain).groupby(level=KEY[:4], sort=False)
    return cell.mean().join(cell.size().rename('seeds')).round(1)

@call_parse
def main(
    path:str=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    part:str='small', # `small`; `large`: 50,000 features; `views`: turned images; `whole`: all of MNIST
    seeds:str='0-2', # Seeds, as a range or one
    data:str='', # Which data; all if empty
    noise:str='', # Which noises; all if empty
    only:str='', # Which ways; those of the part if empty
    summary_only:bool=False # Print the table of what is there, and run nothing
):
    "Do the runs that are not done yet, and print the table"
    torch.set_flush_denormal(True)
    a,*b = map(int, seeds.split('-'))
    wanted = lambda o, names: not names or o in names.split(',')
    which = [c for c in cells[part] if wanted(c.data, data) and wanted(c.noise, noise)]
    names = only.split(',') if only else on_images if part == 'views' else on_features
    todo = [(c, m, s) for s in range(a, (b or [a])[0]+1) for c in which for m in names]
    done = {tuple(o) for o in rows(FILE)[KEY].itertuples(index=False)}
    for c,m,s in [] if summary_only else todo:
        if (*c, m, s) not in done: do_run((*c, m, s), Path(path), FILE)
    if len(rows(FILE)): print(summary(rows(FILE)).to_string())
