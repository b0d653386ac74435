"The stack and the grid of benchmarks/seeds.py, and the statistics that its page uses"
import itertools, numpy as np, pandas as pd, pytest, torch
from functools import partial
from pathlib import Path
from fastai.basics import CancelValidException, Callback, CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastai_jocor.all import CoTeachingCallback, CoTeachingPlusCallback, jocor_mlp, JoCorCallback
from fastai_jocor.heads import fused_adam
from fastai_jocor.lab.significance import epochs_to, holm, over_noises
from fastai_jocor.lab.tables import paired_differences
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def seeds(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import seeds
    monkeypatch.setattr(seeds, 'FILE', tmp_path/'results'/'seeds.csv')
    return seeds

def made_up(seed, n=150):
    "Three classes, a third of the labels wrong"
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = torch.from_numpy(np.eye(3)[y]@rng.normal(size=(3,8)) + rng.normal(size=(n,8)))
    given = np.where(rng.random(n) < .33, rng.integers(0, 3, n), y)
    return x,y,given

class NoValidation(Callback):
    def before_validate(self): raise CancelValidException()

def double_net(seed, i, n_out, n_in):
    torch.manual_seed(100*i+seed)
    return jocor_mlp(n_out, n_in).double()

def alone(stack, r, cb, k, epochs, bs):
    "One run with ordinary networks and the library's own callback"
    d,losses = r.source,CrossEntropyLossFlat()
    nets = [double_net(r.seed, i, len(d.names), d.x.shape[1]) for i in range(k)]
    dls = DataLoaders(stack.StackDL([r], bs), stack.StackDL([r], bs))
    learn = Learner(dls, nets[0], loss_func=losses, opt_func=fused_adam)
    cb.models = nets
    set_seed(0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3, cbs=[cb, NoValidation()])
    x,y = d.x_test,torch.as_tensor(d.y_test)
    probs = torch.stack([net(x).softmax(-1) for net in learn.model.peers])
    return nets,float((probs.argmax(-1) == y).double().mean()),float((probs.mean(0).argmax(-1) == y).double().mean())

def schedule(contrast):
    kwargs = dict(contrast=contrast, rule='schedule', rounding='official')
    return (lambda stack, k: stack.JoCorByRun(k, **kwargs),
            lambda r, k: JoCorCallback(k, r.co_lambda, r.tau, **kwargs))

official = dict(rounding='official')
methods = dict(
    kl=(schedule('kl'), 3), one=(schedule('kl'), 1), circle=(schedule('kl_circular'), 3),
    co_teaching=((lambda stack, k: stack.CoTeachingByRun(k, **official),
                  lambda r, k: CoTeachingCallback(k, r.tau, **official)), 2),
    co_teaching_plus=((lambda stack, k: stack.CoTeachingPlusByRun(k, **official),
                       lambda r, k: CoTeachingPlusCallback(k, r.tau, **official)), 2))

@pytest.mark.parametrize('name', methods)
def test_a_stack_trains_each_run_as_if_alone(seeds, monkeypatch, name):
    import seeds_stack as stack
    monkeypatch.setattr(stack, 'new_net', double_net)
    from everyday_data import Source
    (stacked,single),k = methods[name]
    runs = []
    for seed,lam,tau in ((3,.4,.5), (4,.8,.3)):
        x,y,given = made_up(seed)
        runs.append(stack.Run(Source(x, y, *made_up(9)[:2], ['a','b','c'], {}), given, seed, lam, tau))
    cb = stacked(stack, k).set_runs(runs)
    curves,end = stack.train(runs, cb, [1,k], epochs=4, bs=16)
    assert curves.shape == (4,2,2,2)
    for i,r in enumerate(runs):
        nets,peers,ensemble = alone(stack, r, single(r, k), k, 4, 16)
        for net,of_stack in zip(nets, cb.models):
            for j,layer in enumerate((net[1], net[3])):
                torch.testing.assert_close(of_stack.weights[j][i].t(), layer.weight, rtol=1e-6, atol=1e-9)
                torch.testing.assert_close(of_stack.biases[j][i,0], layer.bias, rtol=1e-6, atol=1e-9)
        assert end[i,1].tolist() == pytest.approx([peers,ensemble])
        if k > 1: assert end[i,0,0] == end[i,0,1]       # a single network is its own ensemble

@pytest.fixture
def folder(tmp_path, seeds, monkeypatch):
    "Made-up features in the form of the real ones"
    rng = np.random.default_rng(0)
    y,y_test = rng.integers(0, 10, 300),rng.integers(0, 10, 100)
    mean = rng.normal(size=(10,16))
    x,x_test = (mean[o]+rng.normal(size=(len(o),16)) for o in (y, y_test))
    worse = np.where(rng.random(300) < .4, rng.integers(0, 10, 300), y)
    x,x_test = x.astype(np.float16),x_test.astype(np.float16)
    np.savez(tmp_path/'cifar10_features.npz', x_train=x, y_train=y, x_test=x_test, y_test=y_test, worse_label=worse)
    monkeypatch.setattr(seeds, 'lambdas', [1/3,.8])
    return tmp_path

def test_dry_run(seeds, folder, monkeypatch):
    kwargs = dict(path=str(folder), seeds='0-1', noises='worse', parts='main,strength,default,co')
    monkeypatch.setattr(seeds, 'train', partial(seeds.train, epochs=2))
    seeds.main(**kwargs)
    df = seeds.rows()
    assert not df.duplicated(seeds.KEY).any() and set(df.noise) == {'worse'}
    scored = df[df.seed < 100]
    assert set(scored.method) == {'plain','jocor','default','co_teaching','co_teaching_plus'}
    assert set(scored.k[scored.method == 'plain']) == {1,2,3} and set(scored.seed) == {0,1}
    assert df[df.seed >= 100].groupby(['k','contrast']).size().eq(4).all()    # two λ, two seeds
    curves = df.ensemble_curve.str.split().map(lambda o: [float(v) for v in o]).tolist()
    assert all(len(o) == 2 and 10 < o[-1] <= 100 for o in curves)
    before = seeds.FILE.read_text()
    monkeypatch.setattr(seeds, 'train', lambda *args: pytest.fail('a row that is there was made again'))
    seeds.main(**kwargs)
    assert seeds.FILE.read_text() == before

def test_a_run_is_told_the_share_of_wrong_labels(seeds, folder):
    "Asymmetric noise corrupts half of the classes, so that its share is half of the rate"
    job = seeds.Job('features10k', 'asymmetric 40', 'jocor', 2)
    shares = [seeds.run_of(job, .5, s, folder).tau for s in range(5)]
    assert np.mean(shares) == pytest.approx(.2, abs=.03)

def test_lambda_is_tuned_on_seeds_that_are_not_scored(seeds):
    rows = [dict(data='d', noise='n', method='jocor', k=k, contrast='kl', co_lambda=lam, seed=seed, ensemble=acc)
            for k,lam,seed,acc in ((2,.66667,100,.5), (2,.66667,101,.9), (2,.5,100,.6), (2,.5,101,.7),
                                   (2,.8,0,.99), (2,.8,100,.1), (3,.8,100,.99))]
    assert seeds.best_lambda(pd.DataFrame(rows), seeds.Job('d', 'n', 'jocor', 2, 'kl')) == 2/3
    assert seeds.best_lambda(pd.DataFrame(rows), seeds.Job('d', 'n', 'jocor', 3, 'kl')) == .8

# --- statistics

def slow_holm(p):
    "By the definition: the smallest level of the family at which the step-down procedure rejects"
    def rejects(level):
        left,found = sorted(range(len(p)), key=lambda i: p[i]),set()
        while left and p[left[0]]*len(left) <= level: found.add(left.pop(0))
        return found
    levels = sorted({min(1., n*o) for o in p for n in range(1, len(p)+1)} | {1.})
    return [next((l for l in levels if i in rejects(l)), 1.) for i in range(len(p))]

def test_holm():
    rng = np.random.default_rng(0)
    for n in (1,2,5,9):
        p = rng.random(n)**4
        assert holm(p) == pytest.approx(slow_holm(p))
    with_nan = holm([.02,np.nan,.01])
    assert with_nan[[0,2]] == pytest.approx([.02,.02]) and np.isnan(with_nan[1])
    assert len(holm([])) == 0 and np.isnan(holm([np.nan])).all()

def test_epochs_to():
    curve = [.2,.6,.5,.9]
    assert [epochs_to(curve, o) for o in (.1,.2,.4,.6,.7)] == pytest.approx([1,1,1.5,2,3.5])
    assert np.isnan(epochs_to(curve, .95))

def frame():
    rng = np.random.default_rng(1)
    rows = itertools.product(('x','y','z'), range(5), ('two','three'))
    return pd.DataFrame([dict(noise=n, seed=s, label=l, rank=0, nets=2, score=rng.random()) for n,s,l in rows])

def test_differences_within_seeds():
    df = frame()
    d = paired_differences(df, 'two', 'score').set_index('noise')
    for noise,rs in df.groupby('noise'):
        a,b = (rs[rs.label == o].sort_values('seed').score.to_numpy() for o in ('three','two'))
        assert d.p[noise] == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert d.effect[noise] == pytest.approx(np.mean(a-b)/np.std(a-b, ddof=1))
    alone = paired_differences(df[df.seed == 0], 'two', 'score')
    assert alone[['p','effect']].isna().all(axis=None)

def test_over_noises():
    df = frame()
    df = df.drop(df.index[(df.noise == 'z') & (df.label == 'two')])      # a kind that one of them lacks
    df = df.drop(df.index[(df.noise == 'y') & (df.seed == 3) & (df.label == 'two')])
    both = over_noises(df, ['two','three'], ['score'])
    assert set(both.noise) == {'all 2 kinds'}
    assert set(both.seed[both.label == 'two']) == {0,1,2,4} and set(both.seed[both.label == 'three']) == set(range(5))
    wide = df[df.noise.isin(['x','y'])].pivot(index=['seed','noise'], columns='label', values='score')
    by_hand = (wide.three-wide.two).dropna().drop(3).groupby('seed').mean()
    d = paired_differences(both, 'two', 'score').iloc[0]
    assert d.seeds == 4 and d.difference == pytest.approx(100*by_hand.mean())
    assert d.p == pytest.approx(stats.ttest_1samp(by_hand, 0).pvalue)
