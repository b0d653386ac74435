"Early-learning regularisation: against a loop written out, and in a learner's life."
import copy, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai.vision.all import nn
from fastai_jocor import weigh
from fastai_jocor.all import JoCorCallback, Symmetric
from fastai_jocor.early import early_loss, early_weight, EarlyMeans
from fastai_jocor.untold import hidden_from
from learners import Record, Step, digits, digits64, mlps64, same, tensors, weights
from test_class_weights import A_FIFTH, partly_labelled, WEIGHT
from test_evidence_fits import split
import reference, reference_evidence

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

# --- the functions

@settings(max_examples=30)
@given(n_classes=st.integers(2, 25), seed=st.integers(0, 99), beta=st.sampled_from((0., .5, .9)))
def test_running_means(n_classes, seed, beta):
    "Against a loop; of the classes, ten are remembered"
    rng = np.random.default_rng(seed)
    means,known = EarlyMeans(6, n_classes, beta=beta),{}
    for _ in range(4):
        idx = rng.permutation(6)[:4]
        p = rng.dirichlet(np.ones(n_classes), 4)
        usable = rng.uniform(size=4) < .7
        got = means.update(torch.tensor(idx), torch.tensor(p), torch.tensor(usable))
        for i,p_i,use,row in zip(idx, p, usable, got.numpy()):
            old = known.get(i, np.zeros(n_classes))
            now = (p_i if i not in known else beta*old+(1-beta)*p_i) if use else old
            assert row == pytest.approx(now, abs=1e-5)
            least = np.sort(now)[-min(10, n_classes)]
            if use: known[i] = np.where(now >= least, now, 0)
    for i in range(6):
        kept = means.mean(torch.tensor([i]))[0].numpy()
        assert kept == pytest.approx(known.get(i, np.zeros(n_classes)), abs=1e-5)

@settings(max_examples=30)
@given(k=st.integers(1, 4), n=st.integers(1, 6), seed=st.integers(0, 99))
def test_early_loss(k, n, seed):
    "The definition and its gradient, one item and one peer after the other"
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(k, n, 3, generator=g, dtype=torch.float64).mul(2).requires_grad_()
    t = torch.randn(n, 3, generator=g, dtype=torch.float64).softmax(-1)
    got = early_loss(z.log_softmax(-1), t)
    got.sum().backward()
    p = reference_evidence.softmax(z.detach().numpy())
    for i in range(n):
        with_t = [float(p[m,i] @ t[i].numpy()) for m in range(k)]
        assert got[i].item() == pytest.approx(sum(np.log(1-o) for o in with_t))
        for m,o in enumerate(with_t):
            assert z.grad[m,i].numpy() == pytest.approx(p[m,i]*(o-t[i].numpy())/(1-o))

def test_a_sure_prediction_has_a_finite_loss():
    z = torch.tensor([[[90.,0]]], requires_grad=True)
    loss = early_loss(z.log_softmax(-1), torch.tensor([[1.,0]]))
    loss.sum().backward()
    assert loss.isfinite().all() and z.grad.isfinite().all()

def test_early_weight():
    assert [early_weight(o, .1, 1.) for o in (0, .5, .65, .8, 1)] == pytest.approx([0, 0, 1, 2, 2])
    assert [early_weight(1., o, 1.) for o in (-.2, .01, .03, .05, 1)] == pytest.approx([0, 0, 1, 2, 2])
    assert [early_weight(1., .1, o) for o in (0, .2, .35, .5, 1)] == pytest.approx([0, 0, 1, 2, 2])

def test_what_other_processes_get():
    a,b = EarlyMeans(5, 12),EarlyMeans(5, 12)
    a.update(torch.tensor([1,4]), torch.rand(2, 12).softmax(-1))
    b.put(*a.take_fresh())
    assert torch.equal(a.table, b.table) and len(a.take_fresh()[0]) == 0
    assert (b.table[[1,4]].sum(-1) > 0).all() and not b.table[[0,2,3]].any()

# --- a fit

def at_once(monkeypatch, weight=1.5):
    "The weight from the second epoch on, however little the peers know"
    monkeypatch.setattr(weigh, 'early_weight', lambda *args: weight)

@pytest.mark.parametrize('k', (1,3))
def test_same_as_a_loop(k):
    learn,rec,nets = digits64(),Record(),mlps64(k)
    twins = copy.deepcopy(nets)
    cb = JoCorCallback(k=k, models=nets, plus='early')
    learn.fit(6, 1e-2, cbs=[cb, rec])
    rule,*_ = reference_evidence.train(twins, rec.batches, rec.items(learn), hidden_from(1200, k), 1e-2, early=True)
    reference.assert_same_weights(learn.model.peers, twins)
    for i,mean in rule.means.items():
        assert cb.early.mean(torch.tensor([i]))[0].numpy() == pytest.approx(mean, abs=1e-6)
    assert rule.held_fast > .1 and len(rule.means) == 1200

@pytest.mark.parametrize('no_label', (-100,3))
def test_an_item_without_a_label_is_left_out(no_label, monkeypatch):
    at_once(monkeypatch)
    learn,_ = partly_labelled(no_label, A_FIFTH)
    cb,seen = JoCorCallback(models=mlps64(2), plus='early'),[]
    learn.fit(1, 1e-2, cbs=cb)
    def look(l):
        s = l.selection
        z = s.logits.clone().requires_grad_()
        s.log_probs = z.log_softmax(-1)
        cb.weigh.loss(z, s.targ)[0].backward()
        got,rejected = (z.grad != 0).any(-1).any(0),(s.kept == 0) & ~s.ignored
        assert not got[s.ignored].any() and got[rejected].all()
        assert not cb.early.mean(s.idx[s.ignored]).any() and cb.early.mean(s.idx[~s.ignored]).any(-1).all()
        seen.append(int(s.ignored.sum()))
    learn.fit(1, 1e-2, cbs=[cb, Step(look)])
    assert sum(seen) > 20

@pytest.mark.parametrize('without', (A_FIFTH, torch.zeros_like(A_FIFTH)))
def test_the_mean_of_usable_items(without, monkeypatch):
    "Whatever the class weights, and in a process that selects for itself, as in a single one"
    at_once(monkeypatch)
    learn,_ = partly_labelled(-100, without)
    learn.loss_func = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=-100)
    cb,seen = JoCorCallback(models=mlps64(2), plus='early'),[]
    learn.fit(1, 1e-2, cbs=cb)
    def look(l):
        s = l.selection
        own = torch.where(s.kept > 0, cb.joint_losses(s.logits, s.log_probs, s.targ)[1], 0.).sum()
        own = own/(s.kept*s.weight[s.targ]).sum()
        t = cb.early.mean(s.idx)
        each = [sum(np.log(1-float(p[i] @ t[i].double())) for p in s.log_probs.detach().exp()) for i in range(s.n)]
        used = [each[i] for i in range(s.n) if not without[s.idx][i]]
        assert l.loss_grad.item()-own.item() == pytest.approx(1.5*np.mean(used), abs=1e-5)
        seen.append(len(used))
        if len(seen) > 1: return
        usable = s.usable if s.usable is not None else torch.ones(s.n, dtype=torch.bool)
        cb.early.beta = 1. # the means stay as they are
        alone = [cb.weigh._hold_early(s.log_probs, o).item() for o in (None, usable)]
        s.world = 2
        assert alone == pytest.approx([cb.weigh._hold_early(s.log_probs, o).item() for o in (None, usable)])
        assert alone[1] == pytest.approx(1.5*np.mean(used), abs=1e-5)
        s.world,cb.early.beta = 1,.7
    learn.fit(1, 1e-2, cbs=[cb, Step(look)])
    assert sum(seen) > 400

# --- a learner's life

def test_means_last_until_a_fit_starts_over(monkeypatch):
    at_once(monkeypatch)
    learn,cb = digits(),JoCorCallback(plus='early')
    learn.fit(1, 1e-3, cbs=cb)
    first = cb.early
    learn.fit(1, 1e-3, cbs=cb)
    assert cb.early is first
    cb.restart = True
    learn.fit(1, 1e-3, cbs=cb)
    assert cb.early is not first
    cb._labels_changed(1.)
    assert cb.early is None
    learn.fit(1, 1e-3, cbs=cb)
    cb.forget()
    assert cb.early is None

def test_a_checkpoint_without_means(monkeypatch):
    "Of a fit without `plus`, or of an older version: those of the callback are not kept"
    at_once(monkeypatch)
    learn,cb = digits(),JoCorCallback(plus='early')
    learn.fit(1, 1e-3, cbs=cb)
    state,cb.learn = cb.state_dict(),learn
    for old in (state | dict(early=None), {k: o for k,o in state.items() if k != 'early'}):
        cb.load_state_dict(old)
        assert cb.early is None
        cb.load_state_dict(state)
        assert torch.equal(cb.early.table, state['early'])

def test_a_frozen_body_and_lr_find(monkeypatch):
    "With a frozen body means are gathered, and nothing is held fast; `lr_find` leaves no trace"
    asked = []
    monkeypatch.setattr(weigh, 'early_weight', lambda *args: asked.append(bool(learn.opt.frozen_idx)) or 1.)
    learn = digits(cbs=(cb := JoCorCallback(k=2, plus='early')), splitter=split)
    learn.fine_tune(2, 1e-2, freeze_epochs=2)
    assert asked and not any(asked)
    before,table,n = weights(learn.model),cb.early.table.clone(),len(asked)
    assert (table[:,0] > 0).all()
    learn.lr_find(num_it=5, show_plot=False)
    assert same(before, weights(learn.model)) and torch.equal(table, cb.early.table) and len(asked) == n

# --- what it is for

def test_wrong_labels_are_not_learned_by_heart():
    "Four of five labels are wrong: fewer wrong labels are predicted, and no fewer classes"
    found = []
    for plus in (None,'early'):
        learn = digits(Symmetric(.8), 1)
        learn.fit_one_cycle(30, 2e-2, cbs=(cb := JoCorCallback(k=3, plus=plus)))
        wrong = torch.as_tensor(learn.dls.noise.flipped)
        by_heart = (cb.items.predicted_label == cb.items.given_label)[wrong]
        found.append((float(by_heart.float().mean()), learn.recorder.values[-1][2]))
    (without,before),(held,after) = found
    assert held < .8*without and after > before-.02, found
