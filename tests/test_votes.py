"Common votes as labels: against a loop written out, in a learner's life, and what they are for."
import copy, math, numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from fastai.vision.all import nn
from fastai_jocor import weigh
from fastai_jocor.all import JoCorCallback, Symmetric
from fastai_jocor.evidence import evidence_state
from fastai_jocor.untold import hidden_from
from fastai_jocor.votes import common_votes, split_with_votes, vote_balance, vote_cut, vote_weight
from learners import Record, Step, digits, digits64, mlps64, same, tensors, weights
from test_class_weights import A_FIFTH, WEIGHT, partly_labelled
from test_evidence_fits import split
from test_resume import same as same_state
import reference, reference_evidence

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

# --- the functions

items = st.lists(st.tuples(st.integers(0, 9).map(lambda o: o/9), st.booleans()), max_size=30)

@given(items=items, wrong=st.integers(0, 8).map(lambda o: o/8), least=st.integers(1, 8))
def test_vote_cut(items, wrong, least):
    conf,hits = np.array([o[0] for o in items]),np.array([o[1] for o in items], bool)
    enough = [math.inf]
    for c in conf:
        above = hits[conf >= c]
        if len(above) >= least and above.mean() >= .75*(1-wrong): enough.append(c)
    assert vote_cut(conf, hits, wrong, .75, least) == min(enough)

@settings(max_examples=30)
@given(k=st.integers(1, 4), n=st.integers(0, 6), seed=st.integers(0, 99), cut=st.floats(0, 1), weight=st.floats(0, 1))
def test_votes_of_a_batch(k, n, seed, cut, weight):
    g = torch.Generator().manual_seed(seed)
    lp = torch.randn(k, n, 3, generator=g, dtype=torch.float64).mul(3).log_softmax(-1)
    times = torch.randint(0, 2, (n,), generator=g).double()
    log_p = lp.exp().mean(0).log()
    vote,sure = common_votes(lp, log_p, cut)
    own,voted = split_with_votes(times, weight*sure.double()).chunk(2)
    for i in range(n):
        votes = {int(lp[m,i].argmax()) for m in range(k)}
        agreed = len(votes) == 1 and bool(log_p[i].max().exp() >= cut)
        assert vote[i] == log_p[i].argmax() and sure[i] == agreed
        assert voted[i] == weight*agreed and own[i] == times[i]*(1-weight*agreed)

def test_vote_weight():
    assert [vote_weight(o, 1.) for o in (0, .5, .65, .8, 1)] == pytest.approx([0, 0, .5, 1, 1])
    assert [vote_weight(1., o) for o in (0, .2, .35, .5, 1)] == pytest.approx([0, 0, .5, 1, 1])

# --- a fit

def sure_of_all(monkeypatch, weight=.5, cut=.15):
    "Votes that count from the second epoch on, however little the peers know"
    monkeypatch.setattr(weigh, 'vote_weight', lambda alike, pct: weight)
    monkeypatch.setattr(weigh, 'vote_cut', lambda conf, hits, wrong: cut)

@pytest.mark.parametrize('k', (1,3))
def test_same_as_a_loop(k):
    learn,rec,nets = digits64(),Record(),mlps64(k)
    twins = copy.deepcopy(nets)
    cb = JoCorCallback(k=k, models=nets, plus='votes')
    learn.fit(6, 1e-2, cbs=[cb, rec])
    rule,*_ = reference_evidence.train(twins, rec.batches, rec.items(learn), hidden_from(1200, k), 1e-2, votes=True)
    reference.assert_same_weights(learn.model.peers, twins)
    assert [row['cut'] for row in cb.evidence.rows] == pytest.approx([row['cut'] for row in rule.rows])
    assert rule.voted_for > 100

def test_vote_balance():
    votes,labels = torch.tensor([.5,.5,0,0]),torch.tensor([.25,.75,.1,0])
    assert vote_balance(votes, labels).tolist() == pytest.approx([.5,1,1,0])

def voted(s, weight=.5, cut=.15):
    "Of a batch: the votes, and the weights of given labels and of votes"
    p = s.log_probs.detach().exp()
    vote = p.mean(0).argmax(-1)
    sure = (p.argmax(-1) == vote).all(0) & (p.mean(0).amax(-1) >= cut)
    if s.usable is not None: sure &= s.usable
    running = s.evidence.running
    also = weight*sure*(running[2]/running[1]).clamp(max=1)[vote]
    return vote, s.kept*(1-also), also

@pytest.mark.parametrize('smoothing', (0., .1))
def test_the_mean_is_weighted(smoothing, monkeypatch):
    "A vote has the class weight of the class that is voted for"
    sure_of_all(monkeypatch)
    learn,seen = digits64(),[]
    learn.loss_func = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=smoothing)
    cb = JoCorCallback(models=mlps64(2), plus='votes', co_lambda=0.)
    learn.fit(1, 1e-2, cbs=cb)
    def look(l):
        s = l.selection
        vote,own,also = voted(s)
        labels,shares = torch.cat([s.targ, vote]),torch.cat([own, also])
        logits = s.logits.repeat(1, 2, 1)
        each = sum(F.cross_entropy(z, labels, WEIGHT, reduction='none', label_smoothing=smoothing) for z in logits)
        assert l.loss_grad.item() == pytest.approx(((shares*each).sum()/(shares*WEIGHT[labels]).sum()).item())
        seen.append(int((also[s.kept == 0] > 0).sum()))
    learn.fit(1, 1e-2, cbs=[cb, Step(look)])
    assert sum(seen) > 20

@pytest.mark.parametrize('no_label', (-100,3))
def test_an_item_without_a_label_gets_none(no_label, monkeypatch):
    "Nor does a vote count for the class that stands for no label"
    sure_of_all(monkeypatch)
    learn,_ = partly_labelled(no_label, A_FIFTH)
    cb,seen = JoCorCallback(models=mlps64(2), plus='votes'),[]
    learn.fit(1, 1e-2, cbs=cb)
    def look(l):
        s = l.selection
        z = s.logits.clone()
        z[:,::2,3] += 30*(no_label == 3)
        z.requires_grad_()
        s.log_probs = z.log_softmax(-1)
        s.pred = s.log_probs.detach().logsumexp(0)-math.log(2)
        loss,s.kept,_ = cb.weigh.loss(z, s.targ)
        loss.backward()
        vote,_,also = voted(s)
        got,rejected = (z.grad != 0).any(-1).any(0),s.kept == 0
        assert not got[s.ignored].any() and not got[rejected & (vote == no_label)].any()
        assert got[(also > 0) & (vote != no_label)].all()
        of_none = vote == no_label
        seen.append([int(o.sum()) for o in (rejected & (also > 0) & ~of_none, rejected & of_none)])
    learn.fit(1, 1e-2, cbs=[cb, Step(look)])
    rejected,of_none = map(sum, zip(*seen))
    assert rejected > 20 and (of_none > 20 or no_label < 0)

# --- a learner's life

def test_a_frozen_body_and_lr_find(monkeypatch):
    "Neither takes votes for labels, and `lr_find` leaves no trace"
    sure_of_all(monkeypatch)
    learn = digits(cbs=(cb := JoCorCallback(k=2, plus='votes')), splitter=split)
    used = []
    learn.add_cb(Step(lambda l: used.append((bool(l.opt.frozen_idx), cb.weigh.vote_weight))))
    learn.fine_tune(2, 1e-2, freeze_epochs=2)
    assert {o for o in used} == {(True, 0.), (False, .5)}
    before,state = weights(learn.model),copy.deepcopy(evidence_state(cb.evidence))
    learn.lr_find(num_it=5, show_plot=False)
    assert same(before, weights(learn.model)) and same_state(state, evidence_state(cb.evidence))
    assert len(learn.get_preds()[0]) == len(learn.dls.valid_ds)

# --- what it is for

def test_votes_do_not_lead_to_few_classes():
    "Four of five labels are wrong, and few items tell how sure is sure enough"
    found = []
    for plus in (None,'votes'):
        learn = digits(Symmetric(.8), 1)
        learn.fit_one_cycle(30, 2e-2, cbs=JoCorCallback(k=3, plus=plus))
        found.append(learn.recorder.values[-1][2])
    assert found[1] > found[0]-.1, found
