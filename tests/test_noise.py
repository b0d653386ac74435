"Noise models on arrays: matrices, draws, exact counts, noise by instance, the record."
import numpy as np, pytest
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt
from hypothesis import given, strategies as st
from scipy.stats import chisquare, norm
from fastai_jocor.noise import *
from fastai_jocor.noise_record import NoiseRecord, plot_noise
from fastai_jocor.transition import item_uniform, realised_transition
from fastai_jocor.instance import InstanceDependent, _seed

rates = st.integers(0,1000).map(lambda r: r/1000)
models = st.one_of(rates.map(Symmetric), rates.map(PairFlip), rates.map(lambda r: Asymmetric(r, {0:1,1:0})))
seeds = st.integers(0,2**31)

# --- draws

@given(noise=models, c=st.integers(2,12), n=st.integers(0,200), seed=seeds)
def test_labels_are_drawn_from_the_matrix(noise, c, n, seed):
    T = noise.transition(c)
    assert T.shape == (c,c) and (T >= -1e-12).all()
    np.testing.assert_allclose(T.sum(1), 1)
    y = np.random.RandomState(seed).randint(0, c, n)
    if n > 1:
        y[:2] = 0
        y[n//2:n//2+2] = 1
    elif n == 1: y[:] = 0
    noisy = noise.corrupt(y, c, seed)
    assert (T[y,noisy] > 0).all()
    perm = np.random.RandomState(seed+1).permutation(n)
    assert (noise.corrupt(y[perm], c, seed, keys=perm) == noisy[perm]).all()
    assert (noise.corrupt(y[:n//2], c, seed) == noisy[:n//2]).all()

@given(seed=seeds, c=st.integers(2,6))
def test_inverse_of_the_cumulated_row(seed, c):
    "The slow way: walk along the row until the item's number is passed"
    T = np.random.RandomState(seed).dirichlet([.5]*c, c)
    y,u = np.arange(60)%c,item_uniform(np.arange(60), seed)
    def walk(row, v): return next(j for j in range(c) if j==c-1 or sum(row[:j+1].tolist()) > v)
    assert Transition(T).corrupt(y, c, seed).tolist() == [walk(T[i], v) for i,v in zip(y,u)]

def test_the_realised_matrix_converges():
    T = np.random.RandomState(0).dirichlet([1.]*5, 5)
    y = np.repeat(np.arange(5), 2000)
    p = []
    for seed in range(40):
        noisy = Transition(T).corrupt(y, 5, seed)
        p += [chisquare(np.bincount(noisy[y==i], minlength=5), T[i]*2000).pvalue for i in range(5)]
    assert min(p) > 1e-5 and .35 < np.mean(p) < .65
    assert np.isnan(realised_transition(np.array([0,0]), np.array([0,1]), 2)[1]).all()

def test_official_draw_depends_on_the_order_and_ours_does_not():
    y = np.arange(500)%10
    perm = np.random.RandomState(0).permutation(500)
    noise = Symmetric(.5)
    official = noise.official()
    assert (official.corrupt(y[perm],10,0) != official.corrupt(y,10,0)[perm]).any()
    assert (noise.corrupt(y[perm],10,0,keys=perm) == noise.corrupt(y,10,0)[perm]).all()
    assert noise.draw == 'item' and official.draw == 'official' and noise != official

@given(noise=models, c=st.integers(2,8), n=st.integers(10,200), seed=seeds)
def test_exact_counts(noise, c, n, seed):
    y = np.r_[0, 1, np.random.RandomState(seed).randint(0, c, n)]
    noise.exact = True
    T = noise.transition(c)
    want = (1-np.diag(T))[y].sum()
    if want > 1e-9 and round(want) == 0:
        with pytest.raises(ValueError, match='cannot reach its rate'): noise.corrupt(y, c, seed)
        return
    noisy = noise.corrupt(y, c, seed)
    assert abs((noisy!=y).sum() - want) <= .5+1e-6
    counts = np.bincount(y*c+noisy, minlength=c*c).reshape(c,c)
    expected,off = np.bincount(y, minlength=c)[:,None]*T,~np.eye(c, dtype=bool)
    assert (np.abs(counts-expected)[off] < 2).all() and (counts[off & (T==0)] == 0).all()
    perm = np.random.RandomState(seed).permutation(len(y))
    assert (noise.corrupt(y[perm], c, seed, keys=perm) == noisy[perm]).all()

def test_every_item_has_its_chance_under_exact_counts():
    y = np.arange(40)%2
    hits = np.mean([PairFlip(.25, exact=True).corrupt(y, 2, s) != y for s in range(800)], axis=0)
    assert (np.abs(hits-.25) < .07).all()

def test_the_official_cifar100_map_is_not_by_superclass():
    T = Asymmetric(1., 'cifar100_official').transition(100)
    assert T.argmax(1).tolist() == [i//5*5+(i+1)%5 for i in range(100)]
    ours = Asymmetric(1., 'cifar100').transition(100).argmax(1)
    superclass = {c: k for k,v in enumerate(cifar100_superclasses.values()) for c in v}
    sup = np.array([superclass[c] for c in cifar100_classes])
    assert np.bincount(sup).tolist() == [5]*20 and len(set(ours)) == 100 and (sup[ours] == sup).all()
    for s in range(20):
        members = np.flatnonzero(sup==s)
        assert ours[members].tolist() == np.roll(members, -1).tolist()

@pytest.mark.parametrize('names', ([0,10,20], [0.,10.,20.], ['0','10','20'], ['0.0','10.0','20.0']))
@pytest.mark.parametrize('map', ({0:10, 10:0}, {0.:10., 10.:0.}, {'0':'10', '10':'0'}))
def test_numbers_in_a_map_are_compared_as_numbers(names, map):
    assert Asymmetric(1., map).transition(names).argmax(1).tolist() == [1,0,2]

def test_a_name_comes_before_a_number():
    assert Asymmetric(1., {1:2, 2:3}).transition([1.,2.,3.]).argmax(1).tolist() == [1,2,2]
    assert Asymmetric(1., {1:2}).transition(['1.0','1','2']).argmax(1).tolist() == [0,2,2]
    with pytest.raises(ValueError, match='class 4, which is not among the 3 classes: 1.0, 2.0, 3.0'):
        Asymmetric(1., {1:4}).transition([1.,2.,3.])

# --- noise that depends on the item

def test_instance_dependent_against_the_slow_way():
    "Flip rates by the inverse of the truncated normal, one softmax over a random projection for each item"
    rs = np.random.RandomState(0)
    x,y = rs.randint(0, 256, (300,5,5), dtype=np.uint8),rs.randint(0, 4, 300)
    noise = InstanceDependent(.3, std=.2)
    noisy = noise.corrupt(y, 4, seed=11, items=x)
    lo,hi = norm.cdf(-.3/.2),norm.cdf(.7/.2)
    for i in range(300):
        rate,flip,target = (item_uniform([i], s)[0] for s in (_seed(11,'rate'), 11, _seed(11,'target')))
        q = .3 + .2*norm.ppf(lo+rate*(hi-lo))
        assert 0 <= q <= 1
        if flip >= q:
            assert noisy[i] == y[i]
            continue
        z = (x[i].ravel()/255.) @ np.random.default_rng(_seed(11,'class',y[i])).standard_normal((25,4))
        p = [0. if c==y[i] else np.exp(z[c]) for c in range(4)]
        want = next(c for c in range(4) if sum(p[:c+1])/sum(p) > target)
        assert noisy[i] == want != y[i]
    assert noise.noise_rate(y, 4) == pytest.approx((noisy!=y).mean(), abs=.08)
    assert InstanceDependent(.2, size=8) != InstanceDependent(.2)

@given(seed=seeds, exact=st.booleans())
def test_instance_noise_belongs_to_the_item(seed, exact):
    rs = np.random.RandomState(seed)
    x,y,perm = rs.rand(60,7),rs.randint(0,3,60),rs.permutation(60)
    noise = InstanceDependent(.4, exact=exact)
    noisy = noise.corrupt(y, 3, seed, items=x)
    assert (noise.corrupt(y[perm], 3, seed, keys=perm, items=x[perm]) == noisy[perm]).all()
    assert (noise.corrupt(y, 3, seed+1, items=x) != noisy).any()
    if exact: assert (noisy!=y).sum() == 24
    else: assert (noise.corrupt(y[:30], 3, seed, items=x[:30]) == noisy[:30]).all()

# --- the record

def test_plot_noise():
    y = np.arange(60)%3
    noise = PairFlip(.5, exact=True)
    rec = NoiseRecord(y, noise.corrupt(y, 3), ['cat','dog','owl'], noise)
    ax = plot_noise(rec)
    assert sorted(t.get_text() for t in ax.texts) == ['0.00']*3+['0.50']*6
    assert [t.get_text() for t in ax.get_xticklabels()] == ['cat','dog','owl'] and '50.0% of 60' in ax.get_title()
    assert np.allclose(ax.images[0].get_array(), rec.matrix) and rec.noise_model is noise
    assert not plot_noise(NoiseRecord(np.arange(50), np.arange(50), 50)).texts
    plt.close('all')

@pytest.mark.parametrize('f,msg', [
    (lambda: Symmetric(-.1), 'rate=-0.1'), (lambda: PairFlip(float('nan')), 'rate=nan'),
    (lambda: Symmetric('0.5'), "rate='0.5'"), (lambda: Asymmetric(.2,'nope'), "map='nope'"),
    (lambda: Asymmetric(.2,[1,0]), 'map='), (lambda: Asymmetric(.2,{0:12}).transition(10), 'class 12'),
    (lambda: Transition([[.9,.2],[0,1]]), 'rows that sum to 1'), (lambda: Transition([[1.2,-.2],[0,1]]), 'at least 0'),
    (lambda: Transition(np.eye(4)).corrupt([0,1],2), 'does not fit 2 classes'),
    (lambda: Symmetric(.5).corrupt([0,3],3), r'must lie in \[0, 3\)'),
    (lambda: Symmetric(.5).corrupt([0.,1.],3), 'class indices'),
    (lambda: Symmetric(.2).corrupt([0,1],2,keys=[1]), 'one each'), (lambda: NoiseRecord([0,1],[0],2), 'one each')])
def test_bad_input(f, msg):
    with pytest.raises(ValueError, match=msg): f()

@pytest.mark.parametrize('seed', (None, 1.5, '1', True))
def test_a_seed_that_is_none(seed):
    with pytest.raises(ValueError, match='seed='): Symmetric(.2).corrupt(np.arange(10), 10, seed)
