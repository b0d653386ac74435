"The ledger against a slow reference, suspects, cleaned data, the estimate of the noise rate, and what is refused."
import copy, math, os, shutil, subprocess, sys, warnings, numpy as np, pandas as pd, pytest, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from pathlib import Path
from fastai.vision.all import (Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, Datasets, GradientAccumulation, ImageBlock, L, Learner, PILImage, ProgressCallback, RandomSplitter,
    TfmdDL, accuracy, get_image_files, merge, nn, noop, parent_label, set_seed)
from hypothesis import given, strategies as st
from fastai.callback.data import WeightedDL
from fastai_jocor.all import *
from fastai_jocor.lab.run import fast_adam

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def digits(noise=Symmetric(.3), bs=32, seed=0, **kwargs):
    set_seed(seed)
    return quiet(Learner(digits_dls(noise=noise, bs=bs, **kwargs), jocor_mlp(10, 64), opt_func=fast_adam, metrics=accuracy))

@pytest.fixture(scope='module')
def trained():
    learn,cb = digits(),JoCorCallback(k=3, watch=[3,70])
    learn.fit_one_cycle(12, 1e-2, cbs=cb)
    return learn,cb

# the ledger, against a record of everything that was seen, item by item in float64

class Slow(Callback):
    "Keep every sighting; which item it is stands in its first number"
    order,run_valid = -4.9,False
    def __init__(self, n): self.n,self.seen = n,{i: [] for i in range(n)}
    def after_pred(self): self.logits = self.pred[0].detach().clone() if isinstance(self.pred, tuple) else self.pred.detach().clone()
    def after_loss(self):
        z,y = self.logits.as_subclass(torch.Tensor).double(),self.yb[0].as_subclass(torch.Tensor)
        losses,p = joint_loss(z, y, .8),z.softmax(-1).mean(0)
        keep = set(sorted(range(len(y)), key=lambda j: losses[j].item())[:max(int((1-self.learn.jo_cor.rate)*len(y)), 1)])
        for j,i in enumerate((self.xb[0][:,0]*1024).round().long().tolist()):
            votes = [int(z[m,j].argmax()) for m in range(len(z))]
            self.seen[i].append(dict(loss=losses[j].item(), prob=p[j,y[j]].item(), conf=p[j].max().item(), vote=int(p[j].argmax()), given=int(y[j]), agree=len(set(votes))==1, kept=j in keep))

    def frame(self):
        rows = []
        for i in range(self.n):
            s,cand,lead,recent = self.seen[i],-1,0,math.nan
            for o in s:
                recent = o['loss'] if recent != recent else .3*recent + .7*o['loss']
                if lead == 0: cand = o['vote']
                lead += 1 if cand == o['vote'] else -1
            mean = lambda f: math.fsum(f(o) for o in s)/len(s) if s else math.nan
            rows.append(dict(seen=len(s), kept=mean(lambda o: o['kept']), last_loss=s[-1]['loss'] if s else math.nan, recent_loss=recent, given=s[-1]['given'] if s else -1, vote=cand, loss=mean(lambda o: o['loss']), prob=mean(lambda o: o['prob']),
                             conf=mean(lambda o: o['conf']), votes_given=mean(lambda o: o['vote']==o['given']), agreement=mean(lambda o: o['agree'])))
        return pd.DataFrame(rows)

N = 203
def _x(i): return torch.cat([torch.tensor([i/1024.]), torch.randn(7, generator=torch.Generator().manual_seed(i))])
def _y(i): return i%4 if i%5 else (i+1)%4

def small_dls(how):
    ds = Datasets(list(range(N)), [[_x],[_y]])
    kw = dict(bs=16, shuffle=True, drop_last=how == 'drop_last', num_workers=2 if how == 'workers' else 0, device='cpu')
    train = WeightedDL(ds, wgts=np.arange(N)%3+.1, **kw) if how == 'weighted' else TfmdDL(ds, **kw)
    return DataLoaders(train, TfmdDL(ds, bs=64), device='cpu')

@pytest.mark.parametrize('how', ('shuffled','weighted','drop_last','workers','bf16','accumulation','k1','folds'))
def test_the_ledger_is_exact(how, monkeypatch):
    if how == 'folds': monkeypatch.setattr(Sightings, 'limit', 3*16*4*4)
    set_seed(1)
    learn = quiet(Learner(small_dls(how), nn.Sequential(nn.Linear(8,32), nn.ReLU(), nn.Linear(32,4)), loss_func=CrossEntropyLossFlat()))
    if how == 'bf16':
        import fastai.callback.fp16 as m
        monkeypatch.setattr(m, 'autocast', lambda dev, dtype: torch.autocast('cpu', dtype=dtype))
        monkeypatch.setattr(m, 'GradScaler', lambda dev, **kw: torch.amp.GradScaler('cpu', **kw))
        learn.to_bf16()
    cb,slow = JoCorCallback(k=1 if how == 'k1' else 3, forget_rate=.3, num_gradual=2),Slow(N)
    cbs = [cb, slow] + [GradientAccumulation(48)]*(how == 'accumulation')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, 1e-2, cbs=cbs)
        learn.fit(3, 1e-2, cbs=cbs)
    want,got = slow.frame(),cb.items.frame()
    if how == 'weighted': assert want.seen.max() > 8 and want.seen.min() < 5 and any(len(o) for o in slow.seen.values())
    elif how == 'drop_last': assert want.seen.sum() == 5*(N//16*16) and want.seen.min() < 5
    else: assert (want.seen == 5).all()
    pd.testing.assert_frame_equal(got[list(want)].reset_index(drop=True), want, check_dtype=False, check_names=False, rtol=1e-4, atol=2e-5)
    assert cb.items.state().keys() == {*Ledger._ints, *Ledger._floats} and sum(o.element_size() for o in cb.items.state().values()) < 100

@given(seed=st.integers(0, 10**6), prune=st.booleans(), counts=st.booleans(), told=st.booleans(), multi=st.booleans(), limit=st.sampled_from([1, 60, 10**6]))
def test_sightings_against_a_loop(seed, prune, counts, told, multi, limit):
    "What is worked out for many batches at once, item by item in float64"
    rs,k,C = np.random.RandomState(seed),3,4
    s,want,offset,ns = Sightings(),[],0,rs.randint(1, 7, rs.randint(1, 6)).tolist()
    s.limit = limit
    pos,repeated = torch.as_tensor(rs.permutation(sum(ns))),torch.as_tensor(rs.rand(sum(ns)) < .3)
    if told: s.order(pos, repeated)
    for b,n in enumerate(ns):
        m = int(rs.randint(1, n+1)) if prune and b%2 else n
        pruned = None if m == n else torch.as_tensor(rs.permutation(n)[:m])
        z,y = torch.as_tensor(rs.randn(k, m, C)),torch.as_tensor(rs.randint(0, 2, (m,C)).astype(float) if multi else rs.randint(0, C, m))
        mean = z.sigmoid().mean(0) if multi else z.softmax(-1).mean(0)
        loss = torch.as_tensor(rs.rand(m).astype(np.float32))
        loss[rs.rand(m) < .1] = torch.nan
        kept = rs.randint(0, 3, m) if counts else np.unique(rs.randint(0, m, m))
        s.add(offset, n, pruned, torch.as_tensor(kept.astype(np.float32) if counts else kept), loss, z, mean.logit() if multi else mean.log(), y)
        for i in range(n):
            j = i if pruned is None else (pruned == i).nonzero().flatten().tolist()
            j = j if pruned is None else j[0] if j else None
            row = dict(idx=int(pos[offset+i]) if told else 0, repeated=bool(repeated[offset+i]) if told else False)
            if j is None: want.append(row | dict(kept=0, loss=math.nan)); continue
            own,p = z[:,j],mean[j]
            row |= dict(kept=float(kept[j]) if counts else float(j in kept), loss=float(loss[j]) if loss[j].isfinite() else math.inf)
            if multi:
                right = [float(p[c]) if y[j,c] else 1-float(p[c]) for c in range(C)]
                row |= dict(prob=sum(right)/C, conf=sum(max(float(o), 1-float(o)) for o in p)/C, vote=-1, given=-1, as_given=all(o > .5 for o in right), agree=all(((own[q] > 0) == (own[0] > 0)).all() for q in range(k)))
            else: row |= dict(prob=float(p[y[j]]), conf=float(p.max()), vote=int(p.argmax()), given=int(y[j]), as_given=int(p.argmax()) == int(y[j]), agree=len({int(o.argmax()) for o in own}) == 1)
            want.append(row)
        offset += n
    got = s.columns('cpu')
    assert list(got) == list(Sightings.names) and (limit > 1 or len(s.folded) == b+1)
    for i,row in enumerate(want):
        for name,v in row.items(): np.testing.assert_allclose(float(got[name][i]), v, rtol=1e-5, atol=1e-6, err_msg=name)
    assert all(len(o) == offset for o in got.values())

def test_the_ledger_by_name(trained):
    learn,cb = trained
    f,rec = cb.ledger,learn.dls.noise
    assert f['item'].tolist() == list(learn.dls.train_ds.items) and (f.given == [str(o) for o in rec.noisy]).all() and (f.true == [str(o) for o in rec.true]).all()
    assert (f.flipped == rec.flipped).all() and f.index.name == 'position' and len(f) == 1258-1
    assert cb.learn is None
    import pickle
    again = pickle.loads(pickle.dumps(cb.source))
    assert again.ds is None and again.vocab == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match='holds no ledger'): JoCorCallback().ledger

@pytest.mark.parametrize('ext', ('csv','parquet'))
def test_a_ledger_in_a_file(trained, tmp_path, ext):
    f = trained[1].ledger
    f.loc[5,['vote']] = None
    f.loc[6,['loss','prob']] = np.nan
    if ext == 'parquet': pytest.importorskip('pyarrow')
    save_ledger(f, tmp_path/f'l.{ext}')
    got = load_ledger(tmp_path/f'l.{ext}')
    pd.testing.assert_frame_equal(got, f.assign(item=f['item'].astype(str)), check_dtype=False, check_exact=True)
    assert got.flipped.dtype == bool and got.seen.dtype.kind == 'i' and got.last_loss.dtype == np.float32
    pd.testing.assert_frame_equal(rank_suspects(got), rank_suspects(f).assign(item=lambda s: s['item'].astype(str)), check_dtype=False)
    with pytest.raises(ValueError, match='must end in'): load_ledger(tmp_path/'l.txt')

def test_parquet_as_others_write_and_read_it(trained, tmp_path):
    pa,pq = pytest.importorskip('pyarrow'),pytest.importorskip('pyarrow.parquet')
    f = trained[1].ledger
    save_ledger(f, tmp_path/'l.parquet')
    t = pq.read_table(tmp_path/'l.parquet')
    assert t.num_rows == len(f) and t.column('item').to_pylist() == [str(o) for o in f['item']] and t.column('position').to_pylist() == list(range(len(f)))
    assert t.schema.field('last_loss').type == pa.float32() and t.schema.field('flipped').type == pa.bool_()
    (tmp_path/'broken.parquet').write_bytes(b'no parquet')
    with pytest.raises(pa.ArrowInvalid): load_ledger(tmp_path/'broken.parquet')

def test_parquet_without_pyarrow(trained, tmp_path, monkeypatch):
    for o in ('pyarrow','fastparquet'): monkeypatch.setitem(sys.modules, o, None)
    with pytest.raises(ImportError, match='needs pyarrow, which is not installed: pip install pyarrow'): save_ledger(trained[1].ledger, tmp_path/'l.parquet')
    with pytest.raises(ImportError, match='needs pyarrow, which is not installed: pip install pyarrow'): load_ledger(tmp_path/'l.parquet')
    assert not (tmp_path/'l.parquet').exists()

# suspects

def test_suspects_are_those_that_stand_out(trained):
    learn,cb = trained
    f,s = cb.ledger,cb.suspects()
    least = {c: f.prob[f.given == c].mean() for c in set(f.given)}
    want = {i for i in f.index if f.vote[i] != f.given[i] and f.conf[i] >= least[f.vote[i]]}
    assert set(s.index) == want and len(want) > 200
    for score,col in dict(loss=f.loss, last=f.last_loss, recent=f.recent_loss, prob=1-f.prob, votes=1-f.votes_given, rejected=1-f.kept, margin=f.conf-f.prob).items():
        r = rank_suspects(f, score=score)
        assert r.score.is_monotonic_decreasing and set(r.index) == want
        np.testing.assert_allclose(r.score, col[r.index])
    assert s.flipped.mean() > .9 and (s.suggested == f.vote[s.index]).all() and (s.given == f.given[s.index]).all()
    assert cb.suspects(7).index.tolist() == s.index[:7].tolist() and len(cb.suspects(10**6)) == len(want)
    assert 'votes against it' in s.evidence.iloc[0] and list(s)[:5] == ['item','given','suggested','score','evidence']
    for bad in (-1, 2.5, 'all'):
        with pytest.raises(ValueError, match='n='): cb.suspects(bad)

def test_nothing_stands_out():
    learn,cb = digits(noise=None),JoCorCallback(k=2, forget_rate=0.)
    learn.fit_one_cycle(12, 1e-2, cbs=cb)
    assert len(cb.suspects(1000)) <= 12
    f = cb.ledger
    f['vote'] = f.given
    assert len(rank_suspects(f, 5)) == 0
    cb.items.vote = cb.items.given.clone()
    with pytest.warns(UserWarning, match='no label stands out'): assert len(cb.suspects(9)) == 0

def test_one_class_and_small_data():
    x = np.random.RandomState(0).randint(0, 256, (12,8,8), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(x, np.zeros(12, dtype=int), ['a','b'], valid=[10,11], bs=64)
    cb = JoCorCallback(k=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(Learner(dls, jocor_mlp(2, 64))).fit(3, 1e-3, cbs=cb)
    assert len(cb.ledger) == 10 and (cb.ledger.seen == 3).all() and cb.estimate.rate <= .95

def test_plots(trained):
    learn,cb = trained
    axs = cb.plot_suspects(6)
    s = cb.suspects(6)
    assert [a.get_title() for a in axs] == [f'{g} → {v}' for g,v in zip(s.given, s.suggested)]
    n = [sum(b.get_height() for b in c) for c in cb.plot_ledger().containers]
    assert n[0] == (~cb.noise.flipped).sum() and sum(c.datavalues.sum() for c in plt.gca().containers) >= n[0]
    ax = cb.plot_dynamics()
    assert len(ax.lines) == 4 and ax.lines[0].get_xdata().tolist() == list(range(12))
    own = pd.DataFrame(cb.watched)
    np.testing.assert_allclose(own[own.pos == 3].loss.mean(), cb.ledger.loss[3], rtol=1e-5)
    with pytest.raises(ValueError, match='were not watched'): cb.plot_dynamics([5])
    assert len(cb.plot_transition()) == 2
    plt.close('all')

def test_pictures_of_suspects_of_which_nothing_is_known(trained):
    learn,cb = trained
    s = cb.suspects(4)
    colors = lambda s: [a.title.get_color() for a in cb.plot_suspects(4, s)]
    assert colors(s.assign(true=s.suggested)) == ['tab:green']*4
    black = colors(s.drop(columns=['true','flipped']))
    assert 'tab:green' not in black and len(set(black)) == 1
    assert colors(s.assign(true=[s.suggested.iloc[0],'x','x','x'])) == ['tab:green',*black[1:]]
    plt.close('all')

def test_classes_without_names():
    x,y = torch.randn(96,8),torch.randint(0,4,(96,))
    dl = DataLoader(list(zip(x, y)), bs=32)
    quiet(Learner(DataLoaders(dl, dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat())).fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.1)))
    assert cb.ledger.given.tolist() == y.tolist() and set(cb.ledger.vote) <= set(range(4))

def test_what_a_new_callback_answers():
    cb = JoCorCallback()
    for f in (cb.transition, cb.plot_transition, lambda: cb.ledger):
        with pytest.raises(ValueError, match='train with it first'): f()

@pytest.mark.parametrize('watch', ([.5], 5, 'ab', [True]))
def test_what_cannot_be_watched(watch):
    with pytest.raises(ValueError, match='watch='): JoCorCallback(watch=watch)

@pytest.mark.parametrize('watch', ([-1],[5000]))
def test_watching_what_is_not_there(watch):
    learn = digits()
    model = learn.model
    with pytest.raises(ValueError, match='watch='): learn.fit(1, cbs=JoCorCallback(watch=watch))
    assert learn.model is model

# data without suspects

@pytest.fixture(scope='module')
def pictures(tmp_path_factory): return digit_files(tmp_path_factory.mktemp('pictures'), 300)

def digit_files(tmp, n):
    from sklearn.datasets import load_digits
    d = load_digits()
    for i,(im,t) in enumerate(zip(d.images, d.target)):
        if t > 2 or i > n: continue
        (tmp/f'c{t}').mkdir(exist_ok=True)
        PILImage.create(np.repeat((im*15).astype(np.uint8)[...,None],3,-1)).save(tmp/f'c{t}'/f'{i}.png')
    return tmp

def all_dls(pictures):
    block = lambda y: DataBlock((ImageBlock, y), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0))
    noisy = block(NoisyCategoryBlock('symmetric:0.3'))
    files = get_image_files(pictures)
    df = pd.DataFrame(dict(file=[str(f) for f in files], label=[f.parent.name for f in files]), index=range(100, 100+len(files)))
    from fastai.vision.all import ColReader
    frame = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('label'), splitter=RandomSplitter(.25, seed=0))
    yield 'memory',digits_dls('symmetric:0.3')
    yield 'noisy block',noisy.dataloaders(pictures, bs=16, num_workers=0)
    yield 'block',block(CategoryBlock).dataloaders(pictures, bs=16, num_workers=0)
    yield 'frame',frame.dataloaders(df, bs=16, num_workers=0)
    yield 'from_dls',InMemoryDataLoaders.from_dls(noisy.dataloaders(pictures, bs=16, num_workers=0), n_workers=0, progress=False)

@pytest.mark.parametrize('how', ('drop','relabel'))
@pytest.mark.parametrize('kind', range(5), ids=('memory','noisy block','block','frame','from_dls'))
def test_cleaned(pictures, how, kind):
    dls = list(all_dls(pictures))[kind][1]
    ds,vocab = dls.train_ds,list(dls.vocab)
    given = [int(ds[i][1]) for i in range(len(ds))]
    pos = [0,3,len(ds)-1]
    s = pd.DataFrame(dict(suggested=[vocab[(given[i]+1)%len(vocab)] for i in pos]), index=pos)
    new = cleaned(dls, s, how)
    left = [i for i in range(len(ds)) if how == 'relabel' or i not in pos]
    want = [vocab.index(s.suggested[i]) if i in pos else given[i] for i in left]
    assert [int(new.train_ds[i][1]) for i in range(len(new.train_ds))] == want and list(new.vocab) == vocab
    for j in (0, 5, len(left)-1): assert np.array_equal(np.asarray(new.train_ds[j][0]), np.asarray(ds[left[j]][0]))
    dl = new.train.new(shuffle=False, drop_last=False)
    assert torch.cat([b[1].as_subclass(torch.Tensor) for b in dl]).tolist() == want
    assert [int(ds[i][1]) for i in range(len(ds))] == given and torch.cat([b[1].as_subclass(torch.Tensor) for b in dls.train.new(shuffle=False, drop_last=False)]).tolist() == given
    assert new.valid_ds is dls.valid_ds
    rec,old = getattr(new, 'noise', None),getattr(dls, 'noise', None)
    assert (rec is None) == (old is None)
    if old is not None: assert rec.noisy.tolist() == want and rec.true.tolist() == old.true[left].tolist() and rec.noise_rate == rec.rate and len(new.noise.table) == len(left)
    cb,learn = JoCorCallback(k=2, forget_rate=.1),quiet(Learner(new, jocor_mlp(len(vocab), 64 if kind == 0 else 192), loss_func=CrossEntropyLossFlat()))
    learn.fit(1, 1e-3, cbs=cb)
    seen = cb.ledger.dropna(subset=['given'])
    assert len(cb.ledger) == len(left) and len(seen) and seen.given.tolist() == [vocab[want[i]] for i in seen.index]
    if kind in (1,2): assert cb.ledger['item'].tolist() == [str(ds.items[i]) for i in left]
    if kind == 3: assert cb.ledger['item'].tolist() == [ds.items.index[i] for i in left]

@pytest.mark.parametrize('index,suggested,how,msg', [([0,0],['1','2'],'drop','each once'), ([5000],['1'],'drop','position'), ([0],['x'],'relabel','not among the classes'), ([0],['1'],'hide',"how='hide'"), (range(1257),['1']*1257,'drop','nothing is left')])
def test_cleaned_refuses(index, suggested, how, msg):
    with pytest.raises(ValueError, match=msg): cleaned(digits_dls(), pd.DataFrame(dict(suggested=suggested), index=list(index)), how)

@pytest.fixture(scope='module')
def trained_on_files(tmp_path_factory):
    "A learner on image files that was trained under wrong labels, and its callback"
    set_seed(0)
    block = DataBlock((ImageBlock, NoisyCategoryBlock('symmetric:0.3')), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0))
    learn,cb = quiet(Learner(block.dataloaders(digit_files(tmp_path_factory.mktemp('files'), 10**4), bs=16, num_workers=0), jocor_mlp(3, 192), opt_func=fast_adam)),JoCorCallback(k=2)
    learn.fit_one_cycle(8, 1e-2, cbs=cb)
    return learn,cb

def test_cleaner_ranks_suspects_first(trained_on_files):
    learn,cb = trained_on_files
    f,s = cb.ledger,cb.suspects(score='loss')
    feed = SuspectsLearner(learn, cb, 'loss')
    _,targs,_,scores = feed.get_preds(dl=feed.dls[0].new(shuffle=False, drop_last=False), with_input=False, with_loss=True, with_decoded=True)
    order = np.argsort(-scores.numpy(), kind='stable')
    assert targs.tolist() == learn.dls.noise.noisy.tolist() and order[:len(s)].tolist() == s.index.tolist() and 20 < len(s) < len(f)
    rest = f.loss[order[len(s):]]
    assert rest.is_monotonic_decreasing and rest.iloc[0] > s.score.min()
    assert len(feed.get_preds(dl=feed.dls[1].new(shuffle=False, drop_last=False), with_input=False, with_loss=True, with_decoded=True)) == 4

def test_the_cleaner_of_fastai(trained_on_files, monkeypatch, capsys):
    "The real widget, driven as its dropdowns drive it"
    pytest.importorskip('ipywidgets')
    import fastai.vision.widgets, IPython.display
    from fastai.vision.widgets import ImageClassifierCleaner
    monkeypatch.setattr(fastai.vision.widgets, 'display', IPython.display.display, raising=False)
    learn,cb = trained_on_files
    w,s = cb.cleaner(learn, max_n=12),cb.suspects()
    assert isinstance(w, ImageClassifierCleaner) and list(w.dd_cats.options) == list(learn.dls.vocab)
    for c in learn.dls.vocab:
        w.dd_cats.value = c
        own = s[s.given == c]
        n = min(len(own), 12)
        assert n > 3 and [str(o) for o in w.iw.fns[:n]] == own['item'].tolist()[:n]
        assert len(w.iw.widget.children) == len(w.iw.fns) and len(w.delete()) == 0 and len(w.change()) == 0
    choose = lambda i,v: setattr(w.iw.widget.children[i].children[1], 'value', v)
    other = own.suggested.iloc[2]
    choose(0, '<Delete>'); choose(2, other); choose(3, '<Delete>')
    assert list(w.delete()) == [0,3] and list(w.change()) == [(2,other)]
    assert [str(w.fns[i]) for i in w.delete()] == own['item'].iloc[[0,3]].tolist()
    w.dd_ds.value = 'Valid'
    assert {str(o) for o in w.iw.fns} <= {str(o) for o in learn.dls.valid_ds.items}

def test_cleaner_without_ipywidgets(trained_on_files, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fastai.vision.widgets', None)
    with pytest.raises(ImportError, match='pip install ipywidgets'): trained_on_files[1].cleaner(trained_on_files[0])

# data without suspects, in a table

def wine(noise=None, **kwargs):
    "A real table: chemistry of 178 wines of three growers, one column as a category"
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas
    from sklearn.datasets import load_wine
    d = load_wine(as_frame=True)
    hue,names = pd.cut(d.data.hue, 3, labels=['pale','mid','deep']).astype(str),[o for o in d.data if o != 'hue']
    df = d.data[names].assign(shade=hue, grower=[f'grower {t}' for t in d.target]).set_axis(range(1000, 1000+len(d.data)))
    df.loc[1005,'ash'] = np.nan
    return df,TabularPandas(df, [Categorify,FillMissing,Normalize], ['shade'], names, 'grower', y_block=NoisyCategoryBlock(noise) if noise else CategoryBlock(), splits=RandomSplitter(.25, seed=0)(df), **kwargs)

@pytest.mark.parametrize('noise', (None,'symmetric:0.3'))
@pytest.mark.parametrize('how', ('drop','relabel'))
def test_cleaned_table(how, noise, tmp_path):
    from fastai.tabular.all import load_learner, tabular_learner
    df,to = wine(noise)
    dls = to.dataloaders(bs=16, path=tmp_path, num_workers=0)
    ds,vocab = dls.train_ds,list(dls.vocab)
    given,before = ds.y.tolist(),ds.items.copy()
    pos = [0,7,len(ds)-1]
    s = pd.DataFrame(dict(suggested=[vocab[(given[i]+1)%3] for i in pos]), index=pos)
    new = cleaned(dls, s, how)
    left = [i for i in range(len(ds)) if how == 'relabel' or i not in pos]
    want = [vocab.index(s.suggested[i]) if i in pos else given[i] for i in left]
    b = list(zip(*new.train.new(shuffle=False, drop_last=False)))
    old = list(zip(*dls.train.new(shuffle=False, drop_last=False)))
    assert torch.cat(b[2]).flatten().tolist() == want and torch.cat(old[2]).flatten().tolist() == given
    for i in range(2): assert torch.equal(torch.cat(b[i]), torch.cat(old[i])[left])
    assert new.train_ds.items.index.tolist() == ds.items.index[left].tolist() and list(new.vocab) == vocab and new.valid_ds is dls.valid_ds and type(new) is type(dls)
    pd.testing.assert_frame_equal(ds.items, before)
    rec,was = getattr(new, 'noise', None),getattr(dls, 'noise', None)
    assert (rec is None) == (was is None) == (noise is None)
    if noise: assert rec.noisy.tolist() == want and rec.true.tolist() == was.true[left].tolist() and list(rec.keys) == [was.keys[i] for i in left] and len(was) == len(ds)
    learn,cb = quiet(tabular_learner(new, layers=[30], metrics=accuracy, path=tmp_path)),JoCorCallback(k=2, forget_rate=.1)
    learn.fit(3, 1e-3, cbs=cb)
    seen = cb.ledger[cb.ledger.seen > 0]
    assert cb.ledger['item'].tolist() == ds.items.index[left].tolist() and seen.given.tolist() == [vocab[want[i]] for i in seen.index]
    p = learn.get_preds(dl=learn.dls.test_dl(df[:20]))[0]
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
        loaded.remove_cb(ProgressCallback)
    assert torch.equal(loaded.get_preds(dl=loaded.dls.test_dl(df[:20]))[0], p)
    again = cleaned(new, s[:0])
    assert again.train_ds.y.tolist() == want

def test_an_audit_of_a_table():
    "From wrong labels in a table to a better table"
    from fastai.tabular.all import tabular_learner
    set_seed(0)
    dls = wine('symmetric:0.25')[1].dataloaders(bs=16)
    learn,cb = quiet(tabular_learner(dls, layers=[50], metrics=accuracy)),JoCorCallback(k=3, forget_rate='auto')
    learn.fit_one_cycle(20, 1e-2, cbs=cb)
    s,rec = cb.suspects(),dls.noise
    assert cb.ledger['item'].tolist() == dls.train_ds.items.index.tolist() and len(s) > 15 and s.flipped.mean() > .7
    ax = cb.plot_suspects(2)[0]
    assert 'shade: ' in ax.texts[0].get_text() and ax.get_title() == f'{s.given.iloc[0]} → {s.suggested.iloc[0]}'
    plt.close('all')
    dropped,relabelled = cleaned(dls, s),cleaned(dls, s, 'relabel')
    assert len(dropped.train_ds) == len(rec)-len(s) and dropped.noise.rate < rec.rate/2 and relabelled.noise.rate < rec.rate/2
    second = quiet(tabular_learner(dropped, layers=[50], metrics=accuracy))
    second.fit_one_cycle(20, 1e-2)
    assert second.validate()[1] > .9

def test_weights_stay_with_their_items(pictures):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0))
    n = len(get_image_files(pictures))
    dls = block.weighted_dataloaders(pictures, np.arange(1, n+1), bs=16, num_workers=0)
    new = cleaned(dls, pd.DataFrame(dict(suggested='c0'), index=[2,5]))
    left = np.setdiff1d(np.arange(len(dls.train_ds)), [2,5])
    np.testing.assert_allclose(new.train.wgts, dls.train.wgts[left]/dls.train.wgts[left].sum())

def test_cleaned_refuses_what_has_no_class():
    from fastai.tabular.all import TabularPandas
    df = pd.DataFrame(dict(x=np.arange(20.), y=np.arange(20.), z=np.arange(20.)))
    dls = TabularPandas(df, [], [], ['x'], 'y', splits=(list(range(15)),list(range(15,20)))).dataloaders(bs=4)
    with pytest.raises(ValueError, match='one class'): cleaned(dls, pd.DataFrame(dict(suggested=['1']), index=[0]))

# the noise rate

@given(seed=st.integers(0, 50), rate=st.sampled_from([0., .1, .3, .5]), c=st.integers(2, 12))
def test_the_confident_joint(seed, rate, c):
    "Against Northcutt's definition, item by item, with votes and the given label alone"
    rs = np.random.RandomState(seed)
    n = 300
    true = rs.randint(0, c, n)
    given = np.where(rs.rand(n) < rate, (true+rs.randint(1, c, n))%c, true)
    conf = rs.uniform(.5, 1, n)
    prob = np.where(given == true, conf, (1-conf)*rs.rand(n))
    f = pd.DataFrame(dict(given=given, vote=true, prob=prob, conf=conf, agreement=1., stability=1.))
    least = {j: prob[given == j].mean() for j in set(given)}
    counts = np.zeros((c,c))
    for y,v,p,q in zip(given, true, prob, conf):
        if v != y and v in least and q >= least[v]: counts[v,y] += 1
        elif p >= least[y]: counts[y,y] += 1
    want = np.zeros((c,c))
    for j in least: want[:,j] = counts[:,j]/counts[:,j].sum()*(given == j).mean()
    J = confident_joint(f, c)
    np.testing.assert_allclose(J, want, atol=1e-12)
    assert J.sum() == pytest.approx(1) and (J >= 0).all()
    np.testing.assert_allclose(transition_of(J).sum(1), 1)
    if rate == 0: assert np.trace(J) == pytest.approx(1)

@pytest.mark.parametrize('noise', (None, 'symmetric:0.2', 'symmetric:0.5'))
def test_the_one_line_estimates_the_rate(noise):
    set_seed(0)
    learn,cb = digits(noise),JoCorCallback(k=3, forget_rate='auto')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_one_cycle(30, 1e-2, cbs=cb)
    h,true = cb.history,0. if noise is None else learn.dls.noise.rate
    assert abs(cb.estimate.rate-true) < .05 and cb.estimate.trusted
    w = cb.warm_up
    assert (h.forget_rate[:w] == 0).all() and h.noise_rate[:w-1].isna().all() and (h.noise_rate[w-1:] == cb.estimate.rate).all()
    assert h.forget_rate[w:].tolist() == forget_schedule(cb.estimate.rate, 30, cb.gradual)[w:].tolist()
    assert learn.recorder.metric_names[7] == 'noise_rate' and abs(cb.transition().diagonal().mean()-(1-true)) < .06

def test_no_rate_is_needed_and_a_later_fit_keeps_the_estimate():
    learn,cb = digits(None),JoCorCallback(k=2, num_gradual=4)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, 1e-2, cbs=cb)
        assert cb.estimate is None and math.isnan(cb.history.noise_rate[0])
        learn.fit(2, 1e-2, cbs=cb)
        est = cb.estimate
        assert est is not None and cb.history.noise_rate.tolist()[1:] == [est.rate]*2
        learn.fit(1, 1e-2, cbs=cb)
        assert cb.estimate is est and cb.history.R.tolist()[3] == pytest.approx(est.rate)
        with learn.added_cbs(cb): learn.lr_find(num_it=5, show_plot=False)
    assert cb.estimate is est and len(cb.history) == 4

def test_an_estimate_that_is_not_to_be_trusted(recwarn):
    x = np.random.RandomState(0).randint(0, 256, (320,8,8), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(x, np.arange(320)%10, bs=32)
    cb,learn = JoCorCallback(k=3),quiet(Learner(dls, jocor_mlp(10, 64), opt_func=fast_adam))
    learn.fit(8, 1e-3, cbs=cb)
    told = [str(w.message) for w in recwarn if 'cannot be told' in str(w.message)]
    assert len(told) == 1 and not cb.estimate.trusted and 'forget_rate' in told[0] and cb.estimate.rate < cb.estimate.joint
    assert (cb.warm_up,cb.gradual) == (2,4) and cb.history.noise_rate.isna().tolist() == [True]*3+[False]*5
    assert cb.history.R.max() == cb.estimate.rate

@pytest.mark.parametrize('told_at,trusted', ((1,True),(1,False),(2,True),(3,False),(None,False)))
def test_an_estimate_waits_as_long_as_the_rate_would_rise(monkeypatch, told_at, trusted):
    import fastai_jocor.callback as m
    calls = []
    def estimates(items, n_classes):
        calls.append(items.frame().seen.max())
        return NoiseEstimate(.1*len(calls) if len(calls) == told_at else 0., .5, .4, .3, trusted and len(calls) == told_at)
    monkeypatch.setattr(m, 'estimate_noise', estimates)
    cb,learn = JoCorCallback(k=2, forget_rate='auto', num_gradual=5),digits()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(4, 1e-3, cbs=cb)
        learn.fit(4, 1e-3, cbs=cb)
    told,at,rate = [w for w in told if 'cannot be told' in str(w.message)],told_at or 3,.1*(told_at or 0)
    assert calls == list(range(3, 3+at)) and cb.estimate.rate == pytest.approx(rate) and len(told) == (not trusted)
    h = cb.history
    assert h.noise_rate.isna().tolist() == [True]*(at+1) + [False]*(7-at) and (h.forget_rate[:at+2] == 0).all()
    assert h.forget_rate[at+2:].tolist() == pytest.approx(forget_schedule(rate, 8, 5)[at+2:])

@given(seed=st.integers(0, 200), single=st.booleans(), level=st.floats(0, 1))
def test_the_rate_where_votes_are_in_doubt(seed, single, level):
    rs = np.random.RandomState(seed)
    n,c = 200,4
    given,vote = rs.randint(0, c, n),rs.randint(0, c, n)
    vote = np.where(rs.rand(n) < .7, given, vote)
    doubts = rs.rand(n)*level
    f = pd.DataFrame(dict(given=given, vote=vote, prob=rs.rand(n)*.4, conf=rs.uniform(.4, 1, n), agreement=1. if single else 1-doubts, stability=1-doubts))
    if (doubts == 0).all(): return
    est,joint = estimate_noise(f, c),1-np.trace(confident_joint(f, c))
    doubt = math.fsum(doubts)/n
    votes = max(sum(int(a != b) for a,b in zip(vote, given))/n - doubt, 0)
    want = joint if doubt <= .2 else 0 if single or doubt > .4 else min(joint, votes)
    assert est.rate == pytest.approx(min(want, .95)) and est.trusted == (doubt <= .2) and est.doubt == pytest.approx(doubt) and est.votes == pytest.approx(votes)
    if not est.trusted: assert ('without dropping any item' in str(est)) == (est.rate == 0) and 'Pass forget_rate' in str(est)

def test_data_that_do_not_tell():
    x,y = torch.randn(96,8),torch.randint(0,4,(96,))
    dl = torch.utils.data.DataLoader(list(zip(x,y)), batch_size=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))
    model = learn.model
    with pytest.raises(ValueError, match='forget_rate=None asks for an estimate'): learn.fit(1, cbs=JoCorCallback())
    assert learn.model is model
    with pytest.raises(ValueError, match="forget_rate='automatic'"): JoCorCallback(forget_rate='automatic')

# the command line and the page

def run_audit(*args, real=False, **kwargs):
    "The command, with a perceptron in the place of the resnet18 that takes long to train from nothing"
    import fastai_jocor.audit as m
    def small(dls, arch, pretrained, path, **kw):
        learn = Learner(dls, jocor_mlp(dls.c, 3*32*32), opt_func=fast_adam, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path)
        learn.pretrained = pretrained
        return learn
    with pytest.MonkeyPatch.context() as mp:
        if not real: mp.setattr(m, 'vision_learner', small)
        _run_audit(*args, **kwargs)

def _run_audit(*args, **kwargs):
    from fastai_jocor.audit import jocor_audit
    torch.set_num_threads(1)
    jocor_audit(*map(str, args), **kwargs)

@pytest.fixture(scope='module')
def wrong_pictures(tmp_path_factory):
    "Pictures of three classes, some in the wrong folder, two that are no images, and odd names"
    pictures,root = digit_files(tmp_path_factory.mktemp('right'), 10**4),tmp_path_factory.mktemp('wrong')/'images'
    names = {'c0': '=zero', 'c1': '<script>alert(1)</script>'.replace('/','_'), 'c2': "it's \"two\""}
    for i,f in enumerate(sorted(get_image_files(pictures))):
        to = names['c1'] if i%9 == 0 and f.parent.name == 'c0' else names[f.parent.name]
        (root/to).mkdir(parents=True, exist_ok=True)
        shutil.copy(f, root/to/f"{f.parent.name}_{i}'\"&.png")
    for n in names.values(): (root/n/'broken.png').write_bytes(b'no image')
    (root/names['c0']/'broken.png').unlink()
    return root,names

@pytest.fixture(scope='module')
def audited(wrong_pictures, tmp_path_factory):
    root,names = wrong_pictures
    before,out = {f: f.read_bytes() for f in root.rglob('*') if f.is_file()},tmp_path_factory.mktemp('audit')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run_audit(root, out=str(out), epochs=8, size=32, bs=16, k=2)
    assert {f: f.read_bytes() for f in root.rglob('*') if f.is_file()} == before
    return root,names,out

def page_data(out):
    import json, re
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', (out/'suspects.html').read_text(encoding='utf-8'), re.S)[1])

def test_an_audit_of_a_folder(audited):
    root,names,out = audited
    s = read_table(out/'suspects.csv')
    data = page_data(out)
    assert sorted(p.name for p in (out/'models').glob('*')) == [] and [r['item'] for r in data['rows']] == s['item'].tolist()
    assert len(data['bad']) == 2 and all('broken.png' in o for o in data['bad'])
    moved = {str(f.relative_to(root).as_posix()) for f in root.rglob('c0_*') if f.parent.name == names['c1']}
    assert len(moved) > 15 and len(set(s['item']) & moved) > len(moved)/2 and len(s) < 3*len(moved)
    text = (out/'suspects.csv').read_text()
    assert "'=zero" in text and all(r['picture'].startswith('data:image/jpeg;base64,') for r in data['rows'])
    assert names['c1'] in set(s.given) and '<script>alert' not in (out/'suspects.html').read_text(encoding='utf-8')

def test_cleaned_takes_no_table_of_other_items(trained, pictures, tmp_path):
    learn,cb = trained
    dls,s = learn.dls,cb.suspects()
    s.to_csv(tmp_path/'s.csv')
    with pytest.raises(ValueError, match='at position 0 of the training set'): cleaned(dls, s.reset_index(drop=True), 'relabel')
    again = cleaned(dls, pd.read_csv(tmp_path/'s.csv', dtype=dict(suggested=str)))
    assert again.noise.flipped.tolist() == cleaned(dls, s).noise.flipped.tolist() and again.noise.rate < .5*dls.noise.rate
    with pytest.raises(ValueError, match="no column 'suggested'"): cleaned(dls, s.drop(columns='suggested'), 'relabel')
    split = lambda seed: DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=seed)).dataloaders(pictures, bs=32)
    one,two = split(1),split(2)
    t = pd.DataFrame(dict(item=[str(one.train_ds.items[i]) for i in (5,9)], suggested=[one.vocab[0]]*2), index=[5,9])
    assert len(cleaned(one, t).train_ds) == len(one.train_ds)-2
    with pytest.raises(ValueError, match='of another split'): cleaned(two, t)

def test_cleaned_text():
    from fastai.text.all import TextDataLoaders
    df = pd.DataFrame(dict(text=['alpha beta','gamma delta','beta beta','delta gamma']*20, label=['c0','c1']*40, is_valid=[False]*60+[True]*20))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=8)
    given = [int(dls.train_ds[i][1]) for i in range(60)]
    s = pd.DataFrame(dict(suggested=['c0','c1']), index=[1,2])
    assert [int(cleaned(dls, s, 'relabel').train_ds[i][1]) for i in range(60)] == [given[0],0,1,*given[3:]]
    new = cleaned(dls, s)
    assert len(new.train_ds) == 58 and list(new.train_ds.tls[1].vocab) == ['c0','c1'] and [int(new.train_ds[i][1]) for i in range(58)] == [given[0],*given[3:]]

def test_apply_keeps_the_columns_of_the_list(tmp_path):
    source = csv_of(tmp_path, 'name,fold,cls\na.png,0,x\nb.png,1,y\nc.png,0,x\n')
    pd.DataFrame(dict(item=['a.png','b.png'], given=['x','y'], suggested=['y','x'], decision=['relabel','drop'])).to_csv(tmp_path/'r.csv', index=False)
    run_audit(source, file_col='name', label_col='cls', apply=str(tmp_path/'r.csv'), out=str(tmp_path/'new'))
    assert (tmp_path/'new'/'cleaned.csv').read_text() == 'name,fold,cls\na.png,0,y\nc.png,0,x\n'
    r = read_table(tmp_path/'r.csv')
    with pytest.raises(ValueError, match='more than once'): apply_reviewed(read_labels(source, None, 'name', 'cls'), pd.concat([r, r[:1]]))

@pytest.mark.parametrize('kw', (dict(n=-1), dict(epochs=0), dict(size=0), dict(bs=0), dict(k=0), dict(seed=-1)))
def test_an_audit_refuses_numbers_before_it_trains(kw, audited, tmp_path):
    with pytest.raises(SystemExit, match=f'{list(kw)[0]}='): run_audit(audited[0], out=str(tmp_path/'out'), **kw)
    assert not (tmp_path/'out').exists()

def test_apply(audited, tmp_path, capsys):
    root,names,out = audited
    s = read_table(out/'suspects.csv')
    r = s[['position','item','given','suggested']].assign(decision=(['relabel','drop','keep']*len(s))[:len(s)])
    write_suspects(r.set_index('position'), tmp_path/'reviewed.csv')
    run_audit(root, apply=str(tmp_path/'reviewed.csv'), out=str(tmp_path/'new'))
    new,old = read_table(tmp_path/'new'/'cleaned.csv').set_index('file').label,read_labels(root).set_index('file').label
    want = old.to_dict()
    for o in r.itertuples():
        if o.decision == 'drop': del want[o.item]
        if o.decision == 'relabel': want[o.item] = o.suggested
    assert new.to_dict() == want and f"{(r.decision == 'drop').sum()} dropped, {(r.decision == 'relabel').sum()} relabelled" in capsys.readouterr().out
    again = read_labels(tmp_path/'new'/'cleaned.csv', root)
    assert dict(zip(again.file, again.label)) == want
    for bad,msg in ((r.assign(decision='maybe'),'must be keep, relabel or drop'), (r.assign(item='x.png'),'not among the files'), (r.assign(given='other'),'was reviewed as'), (r.drop(columns='decision'),"no column 'decision'")):
        with pytest.raises(ValueError, match=msg): apply_reviewed(read_labels(root), bad)

def test_an_interrupted_audit_goes_on(wrong_pictures, tmp_path, capsys, monkeypatch):
    import fastai_jocor.audit as m
    root = wrong_pictures[0]
    files = sorted(f for f in root.rglob('*.png') if 'broken' not in f.name)[::30]
    pd.DataFrame(dict(name=[f.relative_to(root).as_posix() for f in files], cls=[f.parent.name for f in files])).to_csv(tmp_path/'l.csv', index=False)
    args = dict(path=str(root), file_col='name', label_col='cls', epochs=3, size=32, k=2)
    class Die(Callback):
        order = 62
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    old = m._Checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run_audit(tmp_path/'l.csv', out=str(tmp_path/'whole'), **args)
        monkeypatch.setattr(m, 'audit_learner', lambda *a, _f=m.audit_learner, **k: (lambda l: (l.add_cb(Die()), l)[1])(_f(*a, **k)))
        with pytest.raises(KeyboardInterrupt): run_audit(tmp_path/'l.csv', out=str(tmp_path/'cut'), **args)
        assert (tmp_path/'cut'/'models'/'audit_1.pth').exists() and not (tmp_path/'cut'/'suspects.csv').exists()
        monkeypatch.undo()
        run_audit(tmp_path/'l.csv', out=str(tmp_path/'cut'), **args)
        page = m.audit_page
        monkeypatch.setattr(m, 'audit_page', lambda *a: 1/0)
        with pytest.raises(ZeroDivisionError): run_audit(tmp_path/'l.csv', out=str(tmp_path/'late'), **args)
        monkeypatch.setattr(m, 'audit_page', page)
        run_audit(tmp_path/'l.csv', out=str(tmp_path/'late'), **args)
        run_audit(tmp_path/'l.csv', out=str(tmp_path/'resnet'), real=True, **merge(args, dict(epochs=1)))
    assert len(page_data(tmp_path/'resnet')['bad']) == 0
    out = capsys.readouterr().out
    assert 'going on after epoch 1' in out and 'going on after epoch 2' in out
    for o in ('cut','late'): assert (tmp_path/o/'suspects.csv').read_bytes() == (tmp_path/'whole'/'suspects.csv').read_bytes()

@pytest.mark.parametrize('make,msg', [
    (lambda d: d/'nowhere','does not exist'), (lambda d: d,'holds no images in folders'),
    (lambda d: csv_of(d, 'file,label\na.png,x\na.png,y\n'),'names 1 files more than once'), (lambda d: csv_of(d, 'file,label\na.png,x\nb.png,x\n'),'holds 1 class'),
    (lambda d: csv_of(d, 'file,label\na.png,x\nb.png,\nc.png,y\n'),"no label to 1 of 3 files, such as 'b.png'"), (lambda d: csv_of(d, 'file,label\na.png,x\nb.png,x \n'),"spaces around them, such as 'x '"),
    (lambda d: csv_of(d, 'image,label\na.png,x\n'),"has no column 'file'"), (lambda d: csv_of(d, 'file,label\na.png,x\nb.png,y\n'),'cannot be read')])
def test_bad_input(tmp_path, make, msg):
    with pytest.raises(SystemExit, match=msg): run_audit(make(tmp_path), out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_messages_name_options_that_there_are(tmp_path):
    import re
    from fastcore.script import anno_parser
    known = anno_parser(jocor_audit.__wrapped__).format_help()
    with pytest.raises(ValueError) as e: read_labels(csv_of(tmp_path, 'image,label\na.png,x\n'))
    named = re.findall('--[a-z_-]+', str(e.value))
    assert len(named) == 2 and all(o in known for o in named)

def csv_of(d, text):
    (d/'labels.csv').write_text(text)
    return d/'labels.csv'

@given(st.lists(st.text(max_size=12).filter(lambda s: '\x00' not in s and not any(0xd800 <= ord(c) < 0xe000 for c in s)), max_size=8))
def test_cells_are_safe_and_come_back(names):
    import tempfile
    assert [plain_cell(safe_cell(o)) for o in names] == names
    assert not any(str(safe_cell(o))[:1] in tuple('=+-@\t\r') and str(safe_cell(o)) for o in names)

# the page in a browser, which counts what it does and leaves it in its title

BROWSER = next((b for b in map(shutil.which, ('chromium','chromium-browser','google-chrome')) if b), None)

def in_browser(page, script, tmp_path):
    "Open a page with a script at its end that writes to the element `out`, and give its text"
    import html, re
    text = page.read_text(encoding='utf-8').replace('</body>', f'<pre id="out"></pre><script>try {{ document.getElementById("out").textContent = JSON.stringify((() => {{ {script} }})()); }} catch (e) {{ document.getElementById("out").textContent = JSON.stringify("error: " + e); }}</script></body>')
    (tmp_path/'page.html').write_text(text, encoding='utf-8')
    p = subprocess.run([BROWSER,'--headless','--no-sandbox','--disable-gpu','--disable-background-networking',f'--user-data-dir={tmp_path/"profile"}','--dump-dom',(tmp_path/'page.html').as_uri()], capture_output=True, text=True, timeout=120)
    import json
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', p.stdout, re.S)[1]))

@pytest.mark.skipif(BROWSER is None, reason='Chromium is not installed')
def test_the_page_in_a_browser(tmp_path):
    n = 10_000
    rs = np.random.RandomState(0)
    given = ['<script>alert(1)</script>','=cat','dog "x"']
    s = pd.DataFrame(dict(item=[f"""it's "{i}" <img src=x onerror=alert(1)>.png""" for i in range(n)], given=[given[i%3] for i in range(n)], suggested=[given[(i+1)%3] for i in range(n)], score=rs.rand(n), evidence='e'))
    s.loc[77, 'score'] = 2.
    audit_page(s, tmp_path/'suspects.html', bad=['<b>bad</b>.png'], note='<i>note</i>', pictures=['data:image/jpeg;base64,AAAA']*n)
    got = in_browser(tmp_path/'suspects.html', '''
        const cards = () => [...document.querySelectorAll("article")], first = cards()[0].textContent, start = cards().length;
        const scores = cards().map(c => parseFloat(c.querySelectorAll("small")[1].textContent.slice(6)));
        $("pair").value = $("pair").options[1].value; $("pair").onchange();
        const legends = [...new Set(cards().map(c => c.querySelector("legend").textContent))];
        const radios = cards()[0].querySelectorAll("input"); radios[1].checked = true; radios[1].onchange();
        cards()[1].querySelectorAll("input")[2].onchange();
        $("sort").value = "item"; $("sort").onchange();
        return {first, start, descending: scores.every((s, i) => !i || s <= scores[i-1]), legends, count: $("count").textContent, csv: csv(), scripts: document.scripts.length, markup: document.querySelectorAll("article script, article b, #bad b, #note i, img[onerror]").length,
            options: $("pair").options.length, bad: $("bad").textContent, note: $("note").textContent, after: cards().length};''', tmp_path)
    best = s.loc[77]
    assert got['first'].startswith(f'{best.given} → {best.suggested}') and best['item'] in got['first']
    assert 0 < got['start'] < 1000 and got['after'] < 1000 and got['descending'] and len(got['legends']) == 1 and got['options'] == 4
    assert got['markup'] == 0 and got['scripts'] == 3 and '<b>bad</b>.png' in got['bad'] and got['note'] == '<i>note</i>'
    assert got['count'].startswith(f'{n//3+1} of {n} suspects, 2 decided') or got['count'].startswith(f'{n//3} of {n} suspects, 2 decided')
    (tmp_path/'reviewed.csv').write_text(got['csv'], newline='')
    r = read_table(tmp_path/'reviewed.csv')
    assert list(r) == ['position','item','given','suggested','decision'] and sorted(r.decision) == ['drop','relabel']
    for o in r.itertuples(): assert (o.item, o.given, o.suggested) == tuple(s.loc[int(o.position), ['item','given','suggested']])
    assert '://' not in (tmp_path/'suspects.html').read_text(encoding='utf-8')

@pytest.mark.skipif(BROWSER is None or os.name != 'posix', reason='Chromium is not installed')
def test_the_page_fits_the_screen(tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
    import website
    long = 'a_name_without_a_place_to_break_it_'*6
    s = pd.DataFrame(dict(item=[f'{i}{long}.png' for i in range(90)], given=[long, 'cat', 'dog']*30, suggested=['dog', long, 'cat']*30, score=np.arange(90.), evidence='9 of 10 votes against it'))
    audit_page(s, tmp_path/'suspects.html', bad=[f'{long}.png'], note=long*2, pictures=['', 'data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=','']*30)
    chrome = website.Chrome(BROWSER, tmp_path/'profile')
    try:
        chrome.open()
        for width,dark in ((390,False), (1280,False), (1280,True)):
            messages,wide,_ = chrome.visit((tmp_path/'suspects.html').as_uri(), width, dark)
            assert messages == [] and wide <= width
    finally: chrome.close()
