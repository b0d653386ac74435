import subprocess, sys, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from scipy.stats import chisquare
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt
from fastai.vision.all import (ColReader, DataBlock, ImageBlock, IndexSplitter, Learner, PILImage, TransformBlock, get_image_files, load_learner, nn, parent_label, warnings)
from fastai_jocor.noise import *
from fastai_jocor.instance import *
from fastai_jocor.human import *
from fastai_jocor.blocks import *
from fastai_jocor.noise import cifar100_classes, cifar100_superclasses, item_uniform

rates = st.integers(0,1000).map(lambda r: r/1000)
recipes_st = st.one_of(rates.map(Symmetric), rates.map(PairFlip), rates.map(lambda r: Asymmetric(r, {0:1,1:0})))

@given(recipe=recipes_st, c=st.integers(2,12), n=st.integers(0,200), seed=st.integers(0,2**31))
def test_a_recipe_draws_from_its_matrix(recipe, c, n, seed):
    T = recipe.transition(c)
    assert T.shape == (c,c) and (T >= -1e-12).all()
    np.testing.assert_allclose(T.sum(1), 1)
    y = np.random.RandomState(seed).randint(0, c, n)
    y[:2*(n>1)],y[n//2:n//2+2*(n>1)] = 0,1
    if n == 1: y[:] = 0
    noisy = recipe.corrupt(y, c, seed)
    assert (T[y,noisy] > 0).all()
    perm = np.random.RandomState(seed+1).permutation(n)
    assert (recipe.corrupt(y[perm], c, seed, keys=perm) == noisy[perm]).all()
    assert (recipe.corrupt(y[:n//2], c, seed) == noisy[:n//2]).all()

@given(seed=st.integers(0,2**31), c=st.integers(2,6))
def test_inverse_of_the_cumulated_row(seed, c):
    "The slow way: walk along the row until the item's number is passed"
    T = np.random.RandomState(seed).dirichlet([.5]*c, c)
    y,u = np.arange(60)%c,item_uniform(np.arange(60), seed)
    want = [next(j for j in range(c) if j==c-1 or sum(T[i,:j+1].tolist()) > v) for i,v in zip(y,u)]
    assert Transition(T).corrupt(y, c, seed).tolist() == want

def test_the_realised_matrix_converges():
    T = np.random.RandomState(0).dirichlet([1.]*5, 5)
    y = np.repeat(np.arange(5), 2000)
    p = []
    for seed in range(40):
        noisy = Transition(T).corrupt(y, 5, seed)
        p += [chisquare(np.bincount(noisy[y==i], minlength=5), T[i]*2000).pvalue for i in range(5)]
    p = np.array(p)
    assert p.min() > 1e-5 and .35 < p.mean() < .65

def test_official_draw_depends_on_the_order_and_ours_does_not():
    y = np.arange(500)%10
    perm = np.random.RandomState(0).permutation(500)
    assert (Symmetric(.5).official().corrupt(y[perm],10,0) != Symmetric(.5).official().corrupt(y,10,0)[perm]).any()
    assert (Symmetric(.5).corrupt(y[perm],10,0,keys=perm) == Symmetric(.5).corrupt(y,10,0)[perm]).all()

def frame(n=240): return pd.DataFrame(dict(x=range(n), y=['cat','dog','owl']*(n//3)))
def frame_block(recipe=Symmetric(.5), seed=3, **kwargs):
    return DataBlock((TransformBlock, NoisyCategoryBlock(recipe, seed)), get_x=ColReader('x'), get_y=ColReader('y'), splitter=IndexSplitter(range(200,240)), **kwargs)

@pytest.mark.parametrize('workers', (0,2))
def test_a_label_is_the_same_in_every_epoch_and_worker(workers):
    df = frame()
    dls = frame_block().dataloaders(df, bs=16, num_workers=workers, drop_last=False)
    def labels(dl): return {int(x): int(y) for b in dl for x,y in zip(*b)}
    first = labels(dls.train)
    assert first == dict(enumerate(dls.noise.noisy.tolist())) == labels(dls.train)
    assert labels(dls.train.new(shuffle=False)) == first
    truth = {int(x): dls.vocab.o2i[y] for x,y in zip(df.x, df.y)}
    assert labels(dls.valid) == {i: truth[i] for i in range(200,240)}
    assert dls.noise.true.tolist() == [truth[i] for i in range(200)]
    assert .35 < dls.noise.rate < .65 and (dls.noise.flipped == (dls.noise.true != dls.noise.noisy)).all()

def test_integer_and_string_labels_flip_alike():
    df = frame()
    coded = df.assign(y=df.y.map(dict(cat=0, dog=1, owl=2)))
    assert (frame_block().datasets(df).noise.noisy == frame_block().datasets(coded).noise.noisy).all()

def test_pairs_of_array_and_label_flip_alike_however_labels_are_coded():
    x = np.random.RandomState(0).rand(90,4)
    def noisy(labels, xs=x):
        return DataBlock((TransformBlock, NoisyCategoryBlock('symmetric:0.5', 1)), get_x=lambda o: o[0], get_y=lambda o: o[1], splitter=IndexSplitter(range(80,90))).datasets([list(o) for o in zip(xs, labels)])
    y = np.arange(90)%3
    a,b = noisy(y),noisy(np.array(['cat','dog','owl'])[y])
    assert (a.noise.noisy == b.noise.noisy).all() and a.noise.flipped.any()
    for o in (a,b): assert [int(t) for t in o.train.tls[1]] == o.noise.noisy.tolist()
    same = noisy(y, np.repeat(x[:30], 3, axis=0))
    assert [int(t) for t in same.train.tls[1]] == same.noise.noisy.tolist()

def test_a_row_keeps_its_label_when_rows_are_shuffled():
    df = frame()
    a = frame_block().datasets(df)
    mixed = df[:200].sample(frac=1, random_state=1)
    b = frame_block().datasets(pd.concat([mixed, df[200:]]))
    assert dict(zip(mixed.index, b.noise.noisy)) == dict(zip(range(200), a.noise.noisy))

def test_items_that_are_tensors_keep_their_labels_in_another_process():
    import pickle
    torch.manual_seed(0)
    x = torch.randn(60,4)
    ds = DataBlock((TransformBlock, NoisyCategoryBlock(Symmetric(.5), 1)), get_y=lambda o: int(o[0]>0), splitter=IndexSplitter(range(50,60))).datasets(list(x))
    given = [int(o) for o in ds.train.tls[1]]
    assert given == ds.noise.noisy.tolist() and ds.noise.flipped.any()
    import cloudpickle
    again = pickle.loads(cloudpickle.dumps(ds))
    assert [int(o) for o in again.train.tls[1]] == given
    code = "import torch; from fastai_jocor.blocks import item_key; torch.manual_seed(0); print(item_key(torch.randn(60,4)[7]), item_key(('xy','x'+'y')))"
    out = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True).stdout.split()
    assert out == [item_key(x[7]), item_key(('xy','xy'))]

def test_after_load_learner_test_items_keep_their_labels(tmp_path):
    dls = frame_block(Symmetric(1.)).dataloaders(frame(), bs=16, num_workers=0)
    Learner(dls, nn.Sequential(nn.Embedding(240,3)), path=tmp_path).export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = load_learner(tmp_path/'export.pkl')
    test = learn.dls.test_dl(frame()[:9], with_labels=True)
    assert [int(o) for o in test.dataset.tls[1]] == [0,1,2]*3
    assert learn.dls.noise.rate == 1.

@pytest.mark.parametrize('f,msg', [
    (lambda: Symmetric(-.1), 'rate=-0.1'), (lambda: PairFlip(float('nan')), 'rate=nan'), (lambda: Asymmetric(.2,'nope'), "map='nope'"),
    (lambda: Asymmetric(.2,{0:12}).transition(10), 'class 12'), (lambda: Transition([[.9,.2],[0,1]]), 'rows that sum to 1'),
    (lambda: Transition([[1.2,-.2],[0,1]]), 'at least 0'), (lambda: Transition(np.eye(4)).corrupt([0,1],2), 'does not fit 2 classes'),
    (lambda: Symmetric(.5).corrupt([0,3],3), r'must lie in \[0, 3\)'), (lambda: Symmetric(.5).corrupt([0.,1.],3), 'class indices'),
    (lambda: Symmetric('0.5'), "rate='0.5'"), (lambda: Asymmetric(.2,[1,0]), 'map='), (lambda: Symmetric(.2).corrupt([0,1],2,keys=[1]), 'one each'),
    (lambda: NoisyCategoryBlock('symmetric'), "noise='symmetric'"), (lambda: make_noise('white'), "noise='white'"),
    (lambda: NoiseRecord([0,1],[0],2), 'one each')])
def test_bad_input(f, msg):
    with pytest.raises(ValueError, match=msg): f()

@given(recipe=recipes_st, c=st.integers(2,8), n=st.integers(10,200), seed=st.integers(0,2**31))
def test_exact_counts(recipe, c, n, seed):
    y = np.r_[0, 1, np.random.RandomState(seed).randint(0, c, n)]
    recipe.exact = True
    T = recipe.transition(c)
    want = T[y].sum(0), (1-np.diag(T))[y].sum()
    if want[1] > 1e-9 and round(want[1]) == 0:
        with pytest.raises(ValueError, match='cannot reach its rate'): recipe.corrupt(y, c, seed)
        return
    noisy = recipe.corrupt(y, c, seed)
    assert abs((noisy!=y).sum() - want[1]) <= .5+1e-6
    counts = np.bincount(y*c+noisy, minlength=c*c).reshape(c,c)
    off = ~np.eye(c, dtype=bool)
    assert (np.abs(counts - np.bincount(y, minlength=c)[:,None]*T)[off] < 2).all() and (counts[off & (T==0)] == 0).all()
    perm = np.random.RandomState(seed).permutation(len(y))
    assert (recipe.corrupt(y[perm], c, seed, keys=perm) == noisy[perm]).all()

def test_every_item_has_its_chance_under_exact_counts():
    hits = np.mean([PairFlip(.25, exact=True).corrupt(np.arange(40)%2, 2, s) != np.arange(40)%2 for s in range(800)], axis=0)
    assert (np.abs(hits-.25) < .07).all()

def test_instance_dependent_against_the_slow_way():
    "Flip rates by the inverse of the truncated normal, one softmax over a random projection for each item"
    from scipy.stats import norm
    from fastai_jocor.instance import _seed
    rs = np.random.RandomState(0)
    x,y = rs.randint(0, 256, (300,5,5), dtype=np.uint8),rs.randint(0, 4, 300)
    recipe = InstanceDependent(.3, std=.2)
    noisy = recipe.corrupt(y, 4, seed=11, items=x)
    lo,hi = norm.cdf(-.3/.2),norm.cdf(.7/.2)
    for i in range(300):
        u = {n: item_uniform([i], s)[0] for n,s in (('rate',_seed(11,'rate')),('flip',11),('target',_seed(11,'target')))}
        q = .3 + .2*norm.ppf(lo+u['rate']*(hi-lo))
        assert 0 <= q <= 1
        if u['flip'] >= q: assert noisy[i] == y[i]; continue
        z = (x[i].ravel()/255.) @ np.random.default_rng(_seed(11,'class',y[i])).standard_normal((25,4))
        p = [0. if c==y[i] else np.exp(z[c]) for c in range(4)]
        want = next(c for c in range(4) if sum(p[:c+1])/sum(p) > u['target'])
        assert noisy[i] == want != y[i]
    assert recipe.noise_rate(y, 4) == pytest.approx(((noisy!=y).mean()), abs=.08)

@given(seed=st.integers(0,2**31), exact=st.booleans())
def test_instance_noise_belongs_to_the_item(seed, exact):
    rs = np.random.RandomState(seed)
    x,y,perm = rs.rand(60,7),rs.randint(0,3,60),rs.permutation(60)
    r = InstanceDependent(.4, exact=exact)
    noisy = r.corrupt(y, 3, seed, items=x)
    assert (r.corrupt(y[perm], 3, seed, keys=perm, items=x[perm]) == noisy[perm]).all()
    assert (r.corrupt(y, 3, seed+1, items=x) != noisy).any()
    if exact: assert (noisy!=y).sum() == 24
    else: assert (r.corrupt(y[:30], 3, seed, items=x[:30]) == noisy[:30]).all()

def test_the_official_cifar100_map_is_not_by_superclass():
    T = Asymmetric(1., 'cifar100_official').transition(100)
    assert T.argmax(1).tolist() == [i//5*5+(i+1)%5 for i in range(100)]
    ours = Asymmetric(1., 'cifar100').transition(100).argmax(1)
    sup = np.array([next(k for k,v in enumerate(cifar100_superclasses.values()) if c in v) for c in cifar100_classes])
    assert np.bincount(sup).tolist() == [5]*20 and len(set(ours)) == 100 and (sup[ours] == sup).all()
    for s in range(20):
        members = np.flatnonzero(sup==s)
        assert ours[members].tolist() == np.roll(members, -1).tolist()

@pytest.mark.parametrize('text,recipe', (('symmetric:0.5',Symmetric(.5)), ('symmetric:0.5:exact',Symmetric(.5,exact=True)), ('pairflip:.45',PairFlip(.45)), ('asymmetric:0.4',Asymmetric(.4)),
    ('asymmetric:0.4:mnist:exact',Asymmetric(.4,'mnist',exact=True)), ('instance:0.2',InstanceDependent(.2)), ('none',None)))
def test_recipes_from_text(text, recipe):
    assert make_noise(text) == recipe and make_noise(recipe) is recipe
    df = frame()
    if recipe is not None and not isinstance(recipe, (Asymmetric,InstanceDependent)):
        assert (frame_block(text).datasets(df).noise.noisy == frame_block(recipe).datasets(df).noise.noisy).all()

def test_a_block_used_twice_keeps_its_records_apart():
    block = frame_block()
    a = block.datasets(frame())
    given = [int(o) for o in a.train.tls[1]]
    b = block.datasets(frame()[::-1].reset_index(drop=True))
    assert [int(o) for o in a.train.tls[1]] == given == a.noise.noisy.tolist()
    assert [int(o) for o in b.train.tls[1]] == b.noise.noisy.tolist() and (a.noise.true != b.noise.true).any()

def test_in_another_process_the_same_labels(tmp_path):
    code = '''
import sys, numpy as np, pandas as pd
sys.path.insert(0, sys.argv[1])
from test_noise import frame, frame_block
from fastai_jocor.noise import *
from fastai_jocor.instance import *
for r in (Symmetric(.5), InstanceDependent(.5, get_x=lambda row: np.array([row.x, 1.])), PairFlip(.3, exact=True)): print(frame_block(r).datasets(frame()).noise.noisy.tolist())
'''
    from pathlib import Path
    out = subprocess.run([sys.executable,'-W','ignore','-c',code,str(Path(__file__).parent)], capture_output=True, text=True)
    want = [frame_block(r).datasets(frame()).noise.noisy.tolist() for r in (Symmetric(.5), InstanceDependent(.5, get_x=lambda row: np.array([row.x, 1.])), PairFlip(.3, exact=True))]
    assert out.stdout.splitlines() == [str(o) for o in want], out.stderr

def table(df, recipe='symmetric:0.5'):
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas
    return TabularPandas(df, [Categorify,FillMissing,Normalize], ['a'], ['x'], 'y', y_block=NoisyCategoryBlock(recipe, 3), splits=(list(range(200)),list(range(200,240))))

def test_tabular(tmp_path):
    from fastai.tabular.all import tabular_learner
    df = frame().assign(a=list('pqrs')*60)
    to = table(df)
    dls = to.dataloaders(bs=20, path=tmp_path)
    truth = np.array([['cat','dog','owl'].index(o) for o in df.y])
    assert (dls.noise.true == truth[:200]).all() and dls.noise.flipped.sum() > 60
    assert (to.train.y.values == dls.noise.noisy).all() and (to.valid.y.values == truth[200:]).all()
    assert (dls.noise.noisy == frame_block().datasets(frame()).noise.noisy).all()
    for _ in range(2): assert torch.cat([b[2] for b in dls.train.new(shuffle=False, drop_last=False)]).flatten().tolist() == dls.noise.noisy.tolist()
    shuffled = df[:200].sample(frac=1, random_state=0)
    again = table(pd.concat([shuffled, df[200:]])).noise
    assert dict(zip(again.keys, again.noisy)) == dict(zip(dls.noise.keys, dls.noise.noisy))
    assert (table(df.assign(y=truth)).noise.noisy == dls.noise.noisy).all()
    with pytest.raises(ValueError, match='reset_index'): table(pd.concat([df[:120]]*2))
    learn = tabular_learner(dls, layers=[4])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    test = learn.dls.test_dl(df[:50])
    assert test.dataset.y.tolist() == truth[:50].tolist()
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    assert (loaded.dls.noise.noisy == dls.noise.noisy).all() and loaded.dls.test_dl(df[:50]).dataset.y.tolist() == truth[:50].tolist()

def test_a_table_is_not_exported_and_its_flips_are_shown(tmp_path, capsys, monkeypatch):
    import pickle, cloudpickle, IPython.display as ipd
    df = frame().assign(a=list('pqrs')*60)
    dls = table(df, Symmetric(1.)).dataloaders(bs=20)
    again = pickle.loads(cloudpickle.dumps(dls.train.dataset.procs))
    note = next(t for t in again.fs if isinstance(t, ItemNote))
    assert note.item is None
    note('an item')
    assert note.item == 'an item' and pickle.loads(pickle.dumps(note)).item is None
    shown = []
    monkeypatch.setattr(ipd, 'display', lambda o: shown.append(o.data))
    dls.show_batch(max_n=5)
    assert shown[0].count('color:red') == 5 and '(true: ' in shown[0]
    dls.valid.show_batch(max_n=5)
    assert 'color:red' not in shown[-1]

def test_integer_names_missing_labels_and_moved_pairs(tmp_path):
    ints = DataBlock((TransformBlock, NoisyCategoryBlock(Asymmetric(1., {1:2}))), get_y=lambda i: i%3+1, splitter=IndexSplitter([0])).datasets(range(60)).noise
    assert all(str(n) == {'1':'2','2':'2','3':'3'}[str(t)] for t,n in zip(ints.table.true, ints.table.noisy))
    na = DataBlock((TransformBlock, NoisyCategoryBlock('symmetric:0.5', 0, add_na=True)), get_y=lambda i: 'abc'[i%3], splitter=IndexSplitter([0])).datasets(range(300)).noise
    assert list(na.vocab) == ['#na#','a','b','c'] and (na.noisy > 0).all() and .35 < na.rate < .65
    def noisy(root): return DataBlock((TransformBlock, NoisyCategoryBlock('symmetric:0.5')), get_x=lambda o: o[0], get_y=lambda o: o[1], splitter=IndexSplitter([0])).datasets([[root/f'{i}.png', 'abc'[i%3]] for i in range(60)]).noise.noisy
    assert (noisy(tmp_path/'a') == noisy(tmp_path/'b'/'c')).all()
    dates = frame()[:60].set_index(pd.date_range('2020-01-01', periods=60))
    assert DataBlock((TransformBlock, NoisyCategoryBlock('symmetric:0.5')), get_x=ColReader('x'), get_y=ColReader('y'), splitter=IndexSplitter([0])).datasets(dates).noise.flipped.any()
    assert InstanceDependent(.2, size=8) != InstanceDependent(.2)

def test_text(tmp_path):
    from fastai.text.all import TextBlock
    df = pd.DataFrame(dict(text=[f'{w} number {i} is here' for i in range(30) for w in ('alpha','beta')], label=['a','b']*30))
    df.columns = ['words','label']
    block = DataBlock((TextBlock.from_df('words', seq_len=8, tok=SimpleTok()), NoisyCategoryBlock('symmetric:0.5', 1)), get_x=ColReader('text'), get_y=ColReader('label'), splitter=IndexSplitter(range(50,60)))
    dls = block.dataloaders(df, bs=8, num_workers=0)
    assert 10 < dls.noise.flipped.sum() < 40 and dls.noise.true.tolist() == [0,1]*25
    word = {dls.vocab[0].index(w): i for i,w in enumerate(('alpha','beta'))}
    seen = [(word[next(int(t) for t in x if int(t) in word)], int(y)) for xb,yb in dls.train.new(drop_last=False) for x,y in zip(xb,yb)]
    assert sorted(seen) == sorted(zip(dls.noise.true.tolist(), dls.noise.noisy.tolist()))
    assert all(word[next(int(t) for t in x if int(t) in word)] == int(y) for xb,yb in dls.valid for x,y in zip(xb,yb))
    dls.show_batch(max_n=3)

class SimpleTok:
    def __call__(self, items): return (str(o).split() for o in items)

def titles(): return [(ax.get_title(), ax.title.get_color()) for ax in plt.gcf().axes if ax.get_title()]

@pytest.mark.parametrize('seed', range(3))
def test_show_batch_marks_the_flipped(tmp_path, seed):
    for i in range(40): picture_file(tmp_path/'ab'[i%2]/f'{i}.png', i)
    block = DataBlock((ImageBlock, NoisyCategoryBlock('symmetric:0.5', seed)), get_items=get_image_files, get_y=parent_label, splitter=IndexSplitter(range(5)))
    dls = block.dataloaders(tmp_path, bs=8, num_workers=2)
    dls.show_batch(max_n=8)
    shown = titles()
    idxs = dls.train._DataLoader__idxs[:8]
    v,rec = dls.vocab,dls.noise
    assert shown == [(f'{v[rec.noisy[i]]}\n(true: {v[rec.true[i]]})','tab:red') if rec.flipped[i] else (v[rec.noisy[i]],'black') for i in idxs]
    assert any('true' in t for t,_ in shown) and not all('true' in t for t,_ in shown)
    for show in (lambda: dls.valid.show_batch(max_n=4), lambda: dls.show_batch(dls.one_batch(), max_n=4)):
        plt.close('all'); show()
        assert len(titles()) == 4 and all('true' not in t and c=='black' for t,c in titles())
    plt.close('all')

def picture_file(f, i):
    f.parent.mkdir(exist_ok=True)
    PILImage.create(np.full((8,8,3), i, np.uint8)).save(f)

def test_plot_noise():
    y = np.arange(60)%3
    rec = NoiseRecord(y, PairFlip(.5, exact=True).corrupt(y, 3), ['cat','dog','owl'], PairFlip(.5, exact=True))
    ax = plot_noise(rec)
    assert sorted(t.get_text() for t in ax.texts) == ['0.00']*3+['0.50']*6
    assert [t.get_text() for t in ax.get_xticklabels()] == ['cat','dog','owl'] and '50.0% of 60' in ax.get_title()
    assert np.allclose(ax.images[0].get_array(), rec.matrix)
    assert not plot_noise(NoiseRecord(np.arange(50), np.arange(50), 50)).texts
    plt.close('all')

@pytest.mark.parametrize('seed', (None, 1.5, '1', True))
def test_a_seed_that_is_none(seed):
    with pytest.raises(ValueError, match='seed='): Symmetric(.2).corrupt(np.arange(10), 10, seed)
