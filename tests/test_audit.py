"The ledger by name, suspects, plots and the estimated transition matrix."
import pickle, numpy as np, pandas as pd, pytest, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from fastai.vision.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, nn, set_seed
from fastai_jocor.all import InMemoryDataLoaders, JoCorCallback, Symmetric, audit_labels, digits_dls, jocor_mlp
from fastai_jocor.audit import rank_suspects
from fastai_jocor.state import item_names
from fastai_jocor.lab.run import fast_adam
from learners import quiet

def digits(noise=Symmetric(.3)):
    set_seed(0)
    return quiet(Learner(digits_dls(noise=noise, bs=32), jocor_mlp(10, 64), opt_func=fast_adam, metrics=accuracy))

@pytest.fixture(scope='module')
def trained():
    learn,cb = digits(),JoCorCallback(k=3)
    learn.fit_one_cycle(12, 1e-2, cbs=cb)
    return learn,cb

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')

def test_the_ledger_by_name(trained):
    learn,cb = trained
    f,rec = cb.ledger,learn.dls.noise
    assert f['item'].tolist() == list(learn.dls.train_ds.items) and f.index.name == 'position' and len(f) == 1258-1
    assert f.given_label.tolist() == [str(o) for o in rec.noisy]
    assert f.true_label.tolist() == [str(o) for o in rec.true]
    assert (f.flipped == rec.flipped).all() and cb.learn is None
    with pytest.raises(ValueError, match='holds no ledger'): JoCorCallback().ledger

@pytest.mark.parametrize('items,want', [
    ([3, 5], [3, 5]), (['a', 'b'], ['a', 'b']), ([('a', 1), ('b', 2)], ['a', 'b']), ([[1], [2]], [0, 1]),
    (['a'], [0, 1]), (pd.DataFrame(dict(x=[1, 2]), index=['r', 's']), ['r', 's'])])
def test_names_of_items(items, want):
    class Data:
        def __len__(self): return 2
    data = Data()
    data.items = items
    assert item_names(data) == want and item_names([7, 8]) == [0, 1] and item_names(None) == []

def test_classes_without_names():
    x,y = torch.randn(96,8),torch.randint(0,4,(96,))
    dl = DataLoader(list(zip(x, y)), bs=32)
    cb = JoCorCallback(k=2, forget_rate=.1)
    quiet(Learner(DataLoaders(dl, dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat())).fit(2, cbs=cb)
    assert cb.ledger.given_label.tolist() == y.tolist() and set(cb.ledger.predicted_label) <= set(range(4))

@pytest.mark.filterwarnings('ignore')
def test_an_audit_of_classes_without_names():
    x = torch.randn(256,8)
    y = x[:,:4].argmax(1)
    dl = DataLoader(list(zip(x, y)), bs=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl, dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))
    audit = audit_labels(learn, epochs=2, progress=False)
    t = audit.table[audit.table.part == 'train']
    assert audit.vocab == [0,1,2,3] and t.given_label.tolist() == y.tolist()
    assert (t.predicted_label != t.given_label).all() and set(t.predicted_label) <= set(range(4))

@pytest.mark.filterwarnings('ignore')
def test_one_class_and_small_data():
    x = np.random.RandomState(0).randint(0, 256, (12,8,8), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(x, np.zeros(12, dtype=int), ['a','b'], valid=[10,11], bs=64)
    cb = JoCorCallback(k=2)
    quiet(Learner(dls, jocor_mlp(2, 64))).fit(3, 1e-3, cbs=cb)
    assert len(cb.ledger) == 10 and (cb.ledger.seen == 3).all() and cb.estimate.rate <= .95

def test_suspects_are_those_that_stand_out(trained):
    learn,cb = trained
    f,s = cb.ledger,rank_suspects(cb.ledger)
    least = {c: f.prob[f.given_label == c].mean() for c in set(f.given_label)}
    differ = [i for i in f.index if f.predicted_label[i] != f.given_label[i]]
    want = {i for i in differ if f.conf[i] >= least[f.predicted_label[i]]}
    assert set(s.index) == want and len(want) > 200 and s.flipped.mean() > .9
    scores = dict(loss=f.loss, last=f.last_loss, recent=f.recent_loss, prob=1-f.prob, votes=1-f.votes_given,
                  rejected=1-f.kept, margin=f.conf-f.prob)
    for score,col in scores.items():
        r = rank_suspects(f, score=score)
        assert r.score.is_monotonic_decreasing and set(r.index) == want
        np.testing.assert_allclose(r.score, col[r.index])
    for name in ('item','given_label','predicted_label','true_label','flipped'):
        assert (s[name] == f[name][s.index]).all()
    assert list(s)[:5] == ['item','given_label','predicted_label','score','evidence']
    assert rank_suspects(f, 7).index.tolist() == s.index[:7].tolist() and len(rank_suspects(f, 10**6)) == len(want)

def test_evidence(trained):
    s,f = trained[1].suspects(1),trained[1].ledger
    r = f.loc[s.index[0]]
    assert s.evidence.iloc[0] == (f'{1-r.votes_given:.0%} of {r.seen} votes against it, '
                                  f'probability {r.prob:.2f} (vote {r.conf:.2f}), kept {r.kept:.0%}')

def test_what_cannot_be_ranked(trained):
    cb = trained[1]
    for bad in (-1, 2.5, 'all', True):
        with pytest.raises(ValueError, match='n='): cb.suspects(bad)
    with pytest.raises(ValueError, match="score='entropy' is unknown"): cb.suspects(score='entropy')
    with pytest.raises(ValueError, match='items with several labels cannot be ranked'):
        rank_suspects(cb.ledger.assign(given_label=None))

def test_nothing_stands_out():
    learn,cb = digits(noise=None),JoCorCallback(k=2, forget_rate=0.)
    learn.fit_one_cycle(12, 1e-2, cbs=cb)
    assert len(cb.suspects(1000)) <= 12
    f = cb.ledger
    assert len(rank_suspects(f.assign(predicted_label=f.given_label), 5)) == 0
    cb.items.predicted_label = cb.items.given_label.clone()
    with pytest.warns(UserWarning, match='no label stands out'): assert len(cb.suspects(9)) == 0
    assert cb.plot_suspects(suspects=cb.suspects(0)) is None

def test_plots(trained):
    learn,cb = trained
    s = cb.suspects(6)
    titles = [f'{g} → {p}' for g,p in zip(s.given_label, s.predicted_label)]
    assert [a.get_title() for a in cb.plot_suspects(6)] == titles
    clean,flipped = cb.plot_ledger().containers
    assert sum(b.get_height() for b in clean) == (~cb.noise.flipped).sum()
    assert sum(b.get_height() for b in flipped) == cb.noise.flipped.sum()
    assert len(cb.plot_transition()) == 2

def test_pictures_of_suspects_of_which_nothing_is_known(trained):
    learn,cb = trained
    s = cb.suspects(4)
    colors = lambda s: [a.title.get_color() for a in cb.plot_suspects(4, s)]
    assert colors(s.assign(true_label=s.predicted_label)) == ['tab:green']*4
    black = colors(s.drop(columns=['true_label','flipped']))
    assert 'tab:green' not in black and len(set(black)) == 1
    assert colors(s.assign(true_label=[s.predicted_label.iloc[0],'x','x','x'])) == ['tab:green',*black[1:]]

def test_what_a_new_callback_answers():
    cb = JoCorCallback()
    for f in (cb.transition, cb.plot_transition, cb.suspects, cb.plot_ledger, lambda: cb.ledger):
        with pytest.raises(ValueError, match='train with it first'): f()

def test_a_callback_that_was_pickled(trained):
    learn,cb = trained
    again = pickle.loads(pickle.dumps(cb))
    assert again.source.ds is None and cb.ledger['item'].tolist() != list(range(len(cb.ledger)))
    pd.testing.assert_frame_equal(again.ledger, cb.ledger)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(again)).suspects(), cb.suspects())
    with pytest.raises(ValueError, match='no longer has the training set'): again.plot_suspects()
