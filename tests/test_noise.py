import subprocess, sys, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from scipy.stats import chisquare
from fastai.vision.all import ColReader, CrossEntropyLossFlat, DataBlock, IndexSplitter, Learner, TransformBlock, load_learner, nn, warnings
from fastai_jocor.noise import *
from fastai_jocor.noise import item_uniform

recipes_st = st.one_of(st.floats(0,1).map(Symmetric), st.floats(0,1).map(PairFlip), st.floats(0,1).map(lambda r: Asymmetric(r, {0:1,1:0})))

@given(recipe=recipes_st, c=st.integers(2,12), n=st.integers(0,200), seed=st.integers(0,2**31))
def test_a_recipe_draws_from_its_matrix(recipe, c, n, seed):
    T = recipe.transition(c)
    assert T.shape == (c,c) and (T >= -1e-12).all()
    np.testing.assert_allclose(T.sum(1), 1)
    y = np.random.RandomState(seed).randint(0, c, n)
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
    code = "import torch; from fastai_jocor.noise import item_key; torch.manual_seed(0); print(item_key(torch.randn(60,4)[7]), item_key(('xy','x'+'y')))"
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
