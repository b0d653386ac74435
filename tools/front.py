"""Draw the picture of the home page, nbs/images/mnist.png, from benchmarks/results/mnist_protocol: python tools/front.py

The picture carries a mark of the runs that it shows, so that a test can tell when others are there. `python tools/docs.py` draws it anew then.
"""
import hashlib, json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'benchmarks'/'results'/'mnist_protocol'
PICTURE = ROOT/'nbs'/'images'/'mnist.png'
WAYS = {'plain training': dict(method='standard'), 'JoCoR, two peers': dict(method='jocor', k=2, contrast='kl'), 'JoCoR, three peers': dict(method='jocor', k=3, contrast='kl')}
COLORS = ('tab:gray','tab:orange','tab:blue')

def runs(results=RESULTS, noise='symmetric:0.5'):
    "Histories of the finished runs of each way, as text, in the order of their seeds"
    found = {name: {} for name in WAYS}
    for f in sorted(Path(results).glob('*/result.json')):
        cfg = json.loads(f.read_text(encoding='utf-8'))['config']
        for name,want in WAYS.items():
            if cfg['noise'] == noise and all(cfg[k] == v for k,v in want.items()): found[name][cfg['seed']] = (f.parent/'history.csv').read_text(encoding='utf-8')
    return {name: [h for _,h in sorted(hs.items())] for name,hs in found.items() if hs}

def mark(found): return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

def is_drawn(results=RESULTS, picture=PICTURE):
    "Whether the picture shows the runs that are there"
    from PIL import Image
    if not Path(picture).exists(): return False
    with Image.open(picture) as im: return im.info.get('Description') == mark(runs(results))

def draw(results=RESULTS, picture=PICTURE):
    import io, matplotlib, numpy as np, pandas as pd
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = runs(results)
    fig,ax = plt.subplots(figsize=(7.2,3.4), layout='constrained')
    for (name,hs),color in zip(found.items(), COLORS):
        y = np.stack([100*pd.read_csv(io.StringIO(h)).accuracy for h in hs])
        ax.plot(y.mean(0), color=color, lw=2.5, label=f"{name} ({len(hs)} seed{'s'*(len(hs) > 1)})")
        if len(hs) > 1: ax.fill_between(range(y.shape[1]), y.min(0), y.max(0), color=color, alpha=.25, lw=0)
    ax.set(title='MNIST, half of the training labels wrong', xlabel='epoch', ylabel='test accuracy, %', xlim=(0,None))
    ax.grid(alpha=.3); ax.legend(loc='center right')
    fig.savefig(picture, dpi=110, metadata=dict(Software=None, Description=mark(found)))
    plt.close(fig)

if __name__ == '__main__': sys.exit(draw(*sys.argv[1:]))
