"""How well, and at what cost, wrong labels are found: the ledger of one training run against cleanlab and fastai's
top losses.

    pip install cleanlab
    python benchmarks/audit.py --path FOLDER # all cells that are missing, then the tables and the picture
    python benchmarks/audit.py --seeds 0-2   # MNIST with three seeds; --cifar-seeds for CIFAR-10N
    python benchmarks/audit.py --only-tables # the tables and the picture of what is there

FOLDER holds MNIST/raw, cifar10/train, cifar10/test and CIFAR-10_human.pt. All ways have the same corrupted labels,
network, optimizer, one-cycle schedule and number of epochs:

    cv          cleanlab's label quality, on probabilities of 5-fold cross-validation (five networks)
    dynamics    cleanlab's label quality, on the mean of a plain network's probabilities over its epochs
    top_loss    the loss of each training item under a plain network, after its training
    jocor_k     the ledger of JoCorCallback with k peers, the noise rate estimated; nothing beyond the training

Scores are the average precision of finding flipped labels, and the precision among as many items as are flipped.
Seconds are all that a way needs, training included, on one thread. MNIST: stratified items, the papers' perceptron.
CIFAR-10N: stratified images, the papers' 7-layer network in bfloat16, batches of 32. Each cell is written to
results/audit/ under a name with its items and epochs, and is not repeated. Cells of the sizes asked for make
results/audit.csv and audit.png; results/audit_scores.csv holds every score of the ledger in every cell. The default
score, `recent`, was chosen on seed 0 of all five parts: it is short of the best by the least. The other seeds confirm
it. For cleanlab the better of two label qualities counts in each cell, which flatters it a little.
"""
import inspect, json, time, numpy as np, pandas as pd, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Callback, ChannelsLast, Learner, ProgressCallback, noop, set_seed
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import StratifiedKFold
from fastai_jocor.all import *
from fastai_jocor.audit import suspect_scores
from fastai_jocor.order import ItemOrder
from fastai_jocor.files import write_text
from fastai_jocor.lab.store import MemoryDatasets, MemoryDL
from fastai_jocor.lab.run import fast_adam, machine

RESULTS = Path(__file__).resolve().parent/'results'
NOISES = dict(mnist=('symmetric:0.2','symmetric:0.5','asymmetric:0.4'), cifar=('aggre','worse'))
WAYS = ('jocor_3','dynamics','top_loss','cv','jocor_2','jocor_1')
BS,DEFAULT = dict(mnist=128, cifar=32),inspect.signature(rank_suspects).parameters['score'].default

def arrays(data, noise, seed, items, path):
    "Images of the training items, and the record of their labels"
    path = Path(path)
    if data == 'cifar':
        human = HumanLabels(path/'CIFAR-10_human.pt', noise)
        dls = cifar10_dls(path/'cifar10', human, seed, subset=items, progress=False)
    else: dls = mnist_dls(path, Asymmetric(.4, 'mnist') if noise.startswith('asym') else noise, seed, subset=items)
    return dls.train.store.images[dls.train.pos],dls.noise

def learner(data, images, rec, train=None, seed=0):
    "A learner on some of the given labels; a few items are its validation set, since fastai wants one"
    set_seed(seed)
    n = len(rec)
    x,y = torch.cat([images, images[:10]]),np.concatenate([rec.noisy, rec.noisy[:10]])
    dls = InMemoryDataLoaders.from_arrays(
        x, y, list(rec.vocab), range(n, n+10), bs=BS[data], train=train, drop_last=False)
    model,cbs = (jocor_mlp(),None) if data == 'mnist' else (jocor_cnn(),[ChannelsLast(), AutocastBF16()])
    learn = Learner(dls, model, opt_func=fast_adam, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def probabilities(learn, idxs):
    "Of the items at `idxs`"
    dl = learn.dls.train
    items = MemoryDatasets(dl.store, idxs, dl.vocab, 1)
    dl = dl.new(items, cls=MemoryDL, store=dl.store, pos=idxs, bs=512, shuffle=False, drop_last=False)
    return learn.get_preds(dl=dl)[0].numpy()

class Dynamics(Callback):
    "Add up the probabilities of each item while it is trained on"
    order,run_valid = 60,False
    def before_fit(self):
        dl = self.dls.train
        self.sum = torch.zeros(len(dl.dataset), self.dls.c)
        self.items = dl.get_idxs = ItemOrder(dl.get_idxs, dl.n)
    def after_loss(self):
        at = self.iter*self.dl.bs
        items = torch.as_tensor(self.items.idxs[at:at+len(self.pred)])
        self.sum[items] += self.pred.detach().as_subclass(torch.Tensor).softmax(-1)

def quality(rec, p):
    from cleanlab.rank import get_label_quality_scores
    p = p/p.sum(1, keepdims=True)
    return {m: -get_label_quality_scores(rec.noisy, p, method=m) for m in ('self_confidence','normalized_margin')}

def cv(data, images, rec, seed, epochs):
    p = np.zeros((len(rec), len(rec.vocab)))
    for fold,(train,out) in enumerate(StratifiedKFold(5, shuffle=True, random_state=seed).split(rec.noisy, rec.noisy)):
        learn = learner(data, images, rec, train, 10*seed+fold)
        learn.fit_one_cycle(epochs, 2e-3)
        p[out] = probabilities(learn, out)
    return quality(rec, p)

def dynamics(data, images, rec, seed, epochs):
    learn,dyn = learner(data, images, rec, seed=seed),Dynamics()
    learn.fit_one_cycle(epochs, 2e-3, cbs=dyn)
    return quality(rec, dyn.sum.numpy().astype(float))

def top_loss(data, images, rec, seed, epochs):
    learn = learner(data, images, rec, seed=seed)
    learn.fit_one_cycle(epochs, 2e-3)
    return dict(loss=-probabilities(learn, np.arange(len(rec)))[np.arange(len(rec)), rec.noisy])

def jocor(data, images, rec, seed, epochs, k):
    learn,cb = learner(data, images, rec, seed=seed),JoCorCallback(k=k, rule='schedule')
    learn.fit_one_cycle(epochs, 2e-3, cbs=cb)
    f = cb.items.frame()
    return {name: score(f) for name,score in suspect_scores.items()}, cb.estimate

def cell(data, noise, seed, way, items, epochs, path):
    "Do a cell, or read what it gave"
    file = RESULTS/'audit'/f"{data}-{noise.replace(':','')}-{way}-{items}x{epochs}-seed{seed}.json"
    if file.exists(): return json.loads(file.read_text())
    if path is None: return None
    torch.set_num_threads(1)
    images,rec = arrays(data, noise, seed, items, path)
    start,cpu = time.perf_counter(),time.process_time()
    args,est = (data, images, rec, seed, epochs),None
    if way.startswith('jocor'): scores,est = jocor(*args, int(way[-1]))
    else: scores = globals()[way](*args)
    seconds,cpu_seconds = time.perf_counter()-start,time.process_time()-cpu
    res = dict(data=data, noise=noise, seed=seed, way=way, items=len(rec), epochs=epochs, noise_rate=rec.rate,
               estimate=None if est is None else est.rate, trusted=None if est is None else est.trusted,
               seconds=round(seconds, 1), cpu_seconds=round(cpu_seconds, 1),
               scores={name: how_good(rec, s) for name,s in scores.items()}, machine=machine())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(res)+'\n')
    precision = {k: v['average_precision'] for k,v in res['scores'].items()}
    print(data, noise, seed, way, f"{res['cpu_seconds']} s", precision, flush=True)
    return res

def how_good(rec, s):
    "The figures of a score, shape (n,)"
    s,n = np.nan_to_num(s, nan=-np.inf),int(rec.flipped.sum())
    s = np.where(np.isfinite(s), s, s[np.isfinite(s)].min()-1)
    p,r,_ = precision_recall_curve(rec.flipped, s)
    first = np.argsort(-s, kind='stable')[:n]
    return dict(average_precision=round(float(average_precision_score(rec.flipped, s)), 4),
                precision_at_n=round(float(rec.flipped[first].mean()), 4),
                curve=[round(float(o), 4) for o in np.interp(np.linspace(0,1,51), r[::-1], p[::-1])])

def reported(c):
    "The name of the score that a cell is reported with: the ledger's default, the better one of cleanlab's"
    if c['way'].startswith('jocor'): return DEFAULT
    return max(c['scores'], key=lambda o: c['scores'][o]['average_precision'])

KEY = ['data','noise','seed']

def table(cells):
    "A row for each cell"
    rows = []
    for c in cells:
        name = reported(c)
        first = {o: c.get(o) for o in (*KEY,'way','items','epochs','noise_rate','estimate','trusted')}
        figures = {o: c['scores'][name][o] for o in ('average_precision','precision_at_n')}
        rows.append(first | dict(score=name) | figures | {o: c[o] for o in ('cpu_seconds','seconds')})
    df = pd.DataFrame(rows)
    base = df[df.way == 'cv'].set_index(KEY).cpu_seconds.rename('cv')
    return df.assign(time_of_cv=(df.cpu_seconds/df.join(base, on=KEY).cv).round(3))

def score_table(cells):
    "A row for each score of each cell of the ledger's, with the average precision of cross-validation there"
    key = lambda c: tuple(c[o] for o in KEY)
    cv = {key(c): max(o['average_precision'] for o in c['scores'].values()) for c in cells if c['way'] == 'cv'}
    rows = []
    for c in cells:
        if not c['way'].startswith('jocor'): continue
        for name,v in c['scores'].items():
            figures = dict(score=name, average_precision=v['average_precision'], cv=cv.get(key(c)))
            rows.append({o: c[o] for o in (*KEY,'way')} | figures)
    return pd.DataFrame(rows)

def chosen(df):
    "What each score is short of the best of its cell, as means: on seed 0, which decides, and on the others"
    best = df.groupby([*KEY,'way']).average_precision.transform('max')
    df = df.assign(short=best-df.average_precision, seeds=np.where(df.seed == 0, 'seed 0', 'other seeds'))
    res = df.pivot_table(index='score', columns=['seeds','data'], values='short').round(4)
    return res.sort_values(('seed 0',df.data.iloc[0]))

def plot(cells, file):
    "Precision against recall of finding flipped labels, the first seed"
    groups = list(dict.fromkeys((c['data'], c['noise']) for c in cells))
    size = (3.6*len(groups), 3.4)
    fig,axs = plt.subplots(1, len(groups), figsize=size, layout='constrained', sharey=True, squeeze=False)
    for ax,(data,noise) in zip(axs[0], groups):
        for c in cells:
            if (c['data'], c['noise']) != (data,noise) or c['seed'] or c['way'] in ('jocor_1','jocor_2'): continue
            best = c['scores'][reported(c)]
            label = f"{c['way']}: {best['average_precision']:.3f}, {c['cpu_seconds']:.0f} s"
            ax.plot(np.linspace(0,1,51), best['curve'], lw=2 if c['way'].startswith('jocor') else 1.2, label=label)
        ax.set(title=f'{data} {noise}', xlabel='recall', ylim=(0,1.02))
        ax.legend(fontsize=7, loc='best')
    axs[0,0].set(ylabel='precision')
    fig.savefig(file, dpi=90)
    plt.close()

def numbers(text):
    "Of `0`, `0,2` or `0-2`"
    first,_,last = text.partition('-')
    return list(range(int(first), int(last)+1)) if last else [int(o) for o in text.split(',')]

@call_parse
def main(
    path:str=None, # Folder that holds MNIST/raw, cifar10/train, cifar10/test and CIFAR-10_human.pt
    seeds:str='0', # Seeds of the noise and of the training, such as 0-2
    cifar_seeds:str=None, # The same for CIFAR-10N; default: as for MNIST
    data:str='mnist cifar', # Which data to do
    ways:str=' '.join(WAYS), # Which ways to do
    mnist_items:int=20000, # MNIST's training items
    mnist_epochs:int=10,
    cifar_items:int=2000, # CIFAR-10N's training images
    cifar_epochs:int=6,
    only_tables:bool=False # Do no cell
):
    "Do the cells that are not done yet, and write the tables and the picture of all of these sizes"
    sizes = dict(mnist=(mnist_items,mnist_epochs), cifar=(cifar_items,cifar_epochs))
    if not only_tables:
        if path is None: raise SystemExit('path is missing: name the folder with the data, or pass --only-tables')
        for d in data.split():
            for seed in numbers(seeds if d == 'mnist' else cifar_seeds or seeds):
                for noise in NOISES[d]:
                    for way in ways.split(): cell(d, noise, seed, way, *sizes[d], path)
    files = [(d, noise, seed, way) for d in sizes for noise in NOISES[d] for seed in range(100) for way in WAYS]
    cells = [c for d,noise,seed,way in files if (c := cell(d, noise, seed, way, *sizes[d], None))]
    df,scores = table(cells),score_table(cells)
    df.to_csv(RESULTS/'audit.csv', index=False)
    scores.to_csv(RESULTS/'audit_scores.csv', index=False)
    plot(cells, RESULTS/'audit.png')
    print(df.drop(columns=['items','epochs','seconds']).to_string(index=False))
    print(f'\nWhat each score of the ledger is short of the best, in average precision (the default is {DEFAULT})')
    print(chosen(scores).to_string())
