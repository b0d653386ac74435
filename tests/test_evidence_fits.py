"The default rule through a learner's life: frozen bodies, interruptions, GPUs, and what it is for."
import copy, pytest, torch
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, load_learner, nn,
    params, set_seed)
from fastai_jocor.all import Checkpoint, JoCorCallback, Symmetric, jocor_mlp
from fastai_jocor.evidence import Evidence, evidence_state, load_evidence
from fastai_jocor.untold import hidden_from
from fastai_jocor.record import Sightings, lost_classes
from learners import Step, digits, finite, quiet, same, tensors, weights
from sklearn.datasets import load_digits
from sync import as_on_a_gpu
from test_resume import same as same_state

quiet_of_classes = pytest.mark.filterwarnings('ignore:the peers have not learned')

def split(m): return [params(m[1]), params(m[3])]

@quiet_of_classes
def test_nothing_is_dropped_while_the_body_is_frozen():
    cb,lams = JoCorCallback(k=2),[]
    learn = digits(cbs=cb, splitter=split)
    learn.add_cb(Step(lambda l: lams.append((bool(l.opt.frozen_idx), cb.lam, cb.evidence.co_lambda))))
    learn.fine_tune(4, 2e-2, freeze_epochs=9)
    assert cb.history.kept[:9].tolist() == [1]*9 and cb.history.R[:9].tolist() == [0]*9
    assert cb.history.kept.iloc[-1] < .8 and cb.history.R[9] > 0
    assert len(cb.evidence.rows) == 13 and cb.history.noise_high[8] < 1
    frozen = [o for o in lams if o[0]]
    assert len(frozen) == 9*len(learn.dls.train) and all(lam == 0 for _,lam,_ in frozen)
    assert any(shown > 0 for *_,shown in frozen) and any(lam > 0 for *_,lam,_ in lams[len(frozen):])

@quiet_of_classes
def test_lr_find_leaves_no_evidence():
    learn = digits(cbs=(cb := JoCorCallback(k=2)))
    model,before = learn.model,weights(learn.model)
    learn.lr_find(num_it=10, show_plot=False)
    assert cb.evidence is None and learn.model is model and same(before, weights(model))
    learn.fit(3, 1e-2)
    evidence,state,before = cb.evidence,copy.deepcopy(evidence_state(cb.evidence)),weights(learn.model)
    learn.lr_find(num_it=10, show_plot=False)
    assert cb.evidence is evidence and same_state(state, evidence_state(evidence))
    assert same(before, weights(learn.model)) and len(state['rows']) == 3

class StopIn(Callback):
    "Raise in the fourth batch of an epoch"
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and (self.epoch,self.iter) == (self.at,3): raise KeyboardInterrupt

@quiet_of_classes
def test_an_interrupted_fit_goes_on(tmp_path):
    learn = digits(cbs=(cb := JoCorCallback(k=2)), path=tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(4, 1e-2, cbs=StopIn(2))
    assert len(cb.evidence.rows) == 2 and learn.validate()[1] > .2
    learn.fit(3, 1e-2)
    assert len(cb.evidence.rows) == 5 and cb.history.kept.iloc[-1] < .8 and finite(learn.model)
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    item = learn.dls.valid_ds[0][0]
    torch.testing.assert_close(loaded.predict(item)[2], learn.predict(item)[2])

def resumed(path, stops, epochs=6, **kwargs):
    "A run that stops in some epochs and is started again by the same lines"
    for i,stop in enumerate([*stops, None]):
        learn,cb = digits(seed=0, path=path),JoCorCallback(k=2, **kwargs)
        torch.manual_seed(3+i)
        cbs = [cb, Checkpoint()] + ([] if stop is None else [StopIn(stop)])
        if stop is None: learn.fit_one_cycle(epochs, 2e-2, cbs=cbs)
        else:
            with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(epochs, 2e-2, cbs=cbs)
    return learn,cb

@quiet_of_classes
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path):
    (a,one),(b,two) = resumed(tmp_path/'whole', ()),resumed(tmp_path/'cut', (1,4))
    assert same(weights(a.model), weights(b.model))
    assert same_state(evidence_state(one.evidence), evidence_state(two.evidence)) and len(one.evidence.rows) == 6
    assert one.history.equals(two.history) and one.estimate == two.estimate and one.lam == two.lam > 0

# --- classes with few items

def with_few(n, k=2, epochs=2, **kwargs):
    "A fit on digits, of which n are a 3"
    d = load_digits()
    x,y = torch.tensor(d.images).float().div(16)[:,None],torch.tensor(d.target)
    at = torch.cat([(y != 3).nonzero()[:700,0], (y == 3).nonzero()[:n,0]])
    x,y = x[at],y[at]
    learn = tensors(x, y, jocor_mlp(10, 64))
    learn.fit(epochs, 1e-2, cbs=(cb := JoCorCallback(k=k, **kwargs)))
    return cb,y

@quiet_of_classes
def test_the_labels_of_scarce_classes_are_told_after_an_epoch():
    cb,y = with_few(19)
    e,drawn = cb.evidence,hidden_from(len(y), 2)
    assert (drawn[y == 3] >= 0).any() and (e.hidden[y == 3] < 0).all()
    assert torch.equal(e.hidden[y != 3], drawn[y != 3]) and e.rows[0]['n'] == 142 > e.rows[1]['n']
    items,_ = e.untold.known()
    assert items.tolist() == (e.hidden >= 0).nonzero()[:,0].tolist()
    new = Evidence(len(y), 2, 10)
    load_evidence(new, copy.deepcopy(evidence_state(e)))
    assert all((a == b).all() for a,b in zip(new.untold.known(), e.untold.known()))

@quiet_of_classes
@pytest.mark.parametrize('n,kwargs', [(20,{}), (19,dict(hidden=.1)), (19,dict(hidden=.5))])
def test_other_labels_stay_hidden(n, kwargs):
    cb,y = with_few(n, **kwargs)
    assert torch.equal(cb.evidence.hidden, hidden_from(len(y), 2, 0, kwargs.get('hidden')))

@quiet_of_classes
def test_labels_stay_hidden_where_all_classes_are_small():
    d = load_digits()
    x,y = torch.tensor(d.images[:120]).float().div(16)[:,None],torch.tensor(d.target[:120])
    tensors(x, y, jocor_mlp(10, 64)).fit(2, 1e-2, cbs=(cb := JoCorCallback(k=2)))
    assert y.bincount().max() < 20 and torch.equal(cb.evidence.hidden, hidden_from(120, 2))

# --- on a GPU

@quiet_of_classes
@pytest.mark.parametrize('k,loss', ((1,{}), (3,{}), (3,dict(weight=torch.linspace(.5, 2, 10), ignore_index=3))))
def test_the_step_does_not_synchronise(k, loss, monkeypatch):
    monkeypatch.setattr(Sightings, 'limit', 2000)
    def trained():
        learn,cb = digits(loss_func=nn.CrossEntropyLoss(**loss)),JoCorCallback(k=k, seed=1)
        learn.fit(2, 1e-2, cbs=cb)
        cb.evidence.brake = .1
        learn.fit(1, 1e-2, cbs=cb)
        assert .3 < cb.history.kept.iloc[-1] < .9
        return weights(learn.model)
    loose,seen = trained(),[]
    as_on_a_gpu(monkeypatch, seen)
    tight = trained()
    assert seen and all(torch.allclose(p, q, atol=1e-5) for p,q in zip(loose, tight, strict=True))

# --- what it is for

def accuracies(noise, seed):
    "Of plain training and of the one line, and the callback"
    learns = [digits(noise, seed) for _ in range(2)]
    cb = JoCorCallback(k=3)
    learns[0].fit_one_cycle(60, 2e-2)
    learns[1].fit_one_cycle(60, 2e-2, cbs=cb)
    one,three = [l.recorder.values[-1][2] for l in learns]
    assert cb.estimate.low <= learns[1].dls.noise.rate if noise else 0 <= cb.estimate.high
    return one,three,cb.estimate

@pytest.mark.parametrize('seed', (0,1))
def test_half_of_the_labels_are_wrong(seed):
    one,three,est = accuracies(Symmetric(.5), seed)
    assert three > one+.15 and est.low < .5 < est.high

def test_all_labels_are_right():
    one,three,est = accuracies(None, 0)
    assert three > one-.02 and one > .95 and est.low == 0

def rare_recall(**kwargs):
    "Of the digit 3 against all others, one in twenty-one"
    d = load_digits()
    y = torch.as_tensor(d.target == 3).long()
    threes,others = (torch.where(y == c)[0] for c in (1,0))
    train = torch.cat([threes[:40], others[:800]])
    x = torch.as_tensor(d.data/16).float()
    torch.manual_seed(0)
    learn = tensors(x[train], y[train], jocor_mlp(2, 64), bs=64, shuffle=True)
    learn.fit_one_cycle(20, 1e-2, **kwargs)
    rest = threes[40:]
    logits = learn.model.eval()(x[rest])
    return (logits.argmax(-1) == 1).float().mean().item()

def test_a_rare_class_is_learned():
    one,three = rare_recall(),rare_recall(cbs=(cb := JoCorCallback(k=3)))
    assert one > .6 and three >= one/2 and cb.estimate.low == 0
    assert cb.ledger.kept.to_numpy()[:40].mean() > .7

# --- classes that are lost

def test_which_classes_are_lost():
    def lost(given, kept, votes): return lost_classes({n: torch.tensor(o).double() for n,o in locals().items()})
    assert lost([50,50,50], [30,5,30], [60,30,60]) == [1]
    assert lost([50,50,50], [30,9,30], [60,30,60]) == []
    assert lost([50,50,50], [30,30,30], [60,90,0]) == [2]
    assert lost([50,50,4], [30,30,0], [60,90,0]) == [] # too few to say
    assert lost([50,50,50], [50,50,50], [60,90,0]) == [] # nothing was dropped

class KeepNoSeven(Callback):
    "Keep no item of a class, as a selection may"
    order,run_valid = 4,False
    def after_loss(self):
        s = self.learn.selection
        s.kept = torch.where(s.targ == 7, 0., s.kept)

def test_a_lost_class_is_named_once(recwarn):
    cb = JoCorCallback(k=2)
    digits(None, cbs=[cb, KeepNoSeven()]).fit(8, 1e-2)
    told = [str(o.message) for o in recwarn if 'have not learned' in str(o.message)]
    assert len(told) == 1 and "the class '7' (predicted for" in told[0] and '0% of its own kept)' in told[0]
    assert not cb.estimate.trusted and 'enough to be sure' in str(cb.estimate)

@pytest.mark.filterwarnings('error:the peers have not learned')
@pytest.mark.parametrize('noise', (None,Symmetric(.5)))
def test_no_class_is_lost_in_a_healthy_fit(noise):
    digits(noise).fit(8, 1e-2, cbs=(cb := JoCorCallback(k=2)))
    assert cb.estimate.trusted

def overlapping(wrong=0., n=6000, **kwargs):
    "A fit on ten classes that overlap, so that the best network is right for some 58 in 100"
    gen = torch.Generator().manual_seed(0)
    y,centres = torch.randint(0, 10, (n,), generator=gen),torch.randn(10, 16, generator=gen)
    x = .5*centres[y]+torch.randn(n, 16, generator=gen)
    other = torch.randint(0, 10, (n,), generator=gen)
    given = torch.where(torch.rand(n, generator=gen) < wrong, other, y)
    set_seed(0)
    items = list(zip(x, given))
    dls = DataLoaders(DataLoader(items, bs=64, shuffle=True, num_workers=0), DataLoader(items[:100], bs=100))
    learn = quiet(Learner(dls, jocor_mlp(10, 16), loss_func=CrossEntropyLossFlat()))
    learn.fit_one_cycle(8, 3e-3, cbs=(cb := JoCorCallback(k=3, **kwargs)))
    return cb

def test_hard_items_are_kept_if_their_labels_are_right():
    cb,without = overlapping(),overlapping(without=('hardness',))
    assert cb.evidence.flat < .5 and cb.evidence.credit == 0
    assert cb.history.kept.iloc[-1] > .97 and cb.estimate.low < .03
    assert without.history.kept.iloc[-1] < .92

def test_hard_items_are_dropped_if_their_labels_are_wrong():
    cb = overlapping(wrong=.4)
    assert cb.evidence.credit > .6 and cb.history.kept.iloc[-1] < .75
    assert cb.estimate.low < .36 < cb.estimate.high and cb.estimate.low > .2

def test_hardness_does_not_matter_where_tau_is_known_or_labels_are_judged():
    told,judges = overlapping(forget_rate=.2, n=2000),overlapping(hidden=1/3, n=2000)
    assert told.evidence.flat < .6 and told.evidence.credit == judges.evidence.credit == 1
