"`plus`: what common votes and early predictions share in a learner's life."
import pytest, torch
from fastai.vision.all import BCEWithLogitsLossFlat, nn
from fastai_jocor import weigh
from fastai_jocor.all import JoCorCallback
from fastai_jocor.evidence import evidence_state
from fake_gpu import watch
from learners import Step, digits, digits64, mlps64, same, tensors, weights
from sync import as_on_a_gpu
from test_evidence_fits import resumed
from test_resume import same as same_state

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

@pytest.fixture(params=('votes','early'))
def plus(request, monkeypatch):
    "Both, from the second epoch on, however little the peers know"
    monkeypatch.setattr(weigh, 'vote_weight', lambda alike, pct: .5)
    monkeypatch.setattr(weigh, 'vote_cut', lambda conf, hits, wrong: .15)
    monkeypatch.setattr(weigh, 'early_weight', lambda *args: 1.5)
    return request.param

def test_a_resumed_fit_ends_with_the_same_bits(plus, tmp_path):
    (a,one),(b,two) = [resumed(tmp_path/str(len(o)), o, 4, plus=plus) for o in ((), (1,3))]
    (c,none) = resumed(tmp_path/'without', (), 4)
    assert same(weights(a.model), weights(b.model)) and not same(weights(a.model), weights(c.model))
    assert same_state(evidence_state(one.evidence), evidence_state(two.evidence))
    if plus == 'votes': assert one.evidence.rows[0]['cut'] == .15
    else: assert torch.equal(one.early.table, two.early.table) and none.early is None

@pytest.mark.parametrize('loss', ({}, dict(weight=torch.linspace(.5, 2, 10), ignore_index=3)))
def test_the_step_does_not_synchronise(loss, plus, monkeypatch):
    def trained():
        learn = digits(loss_func=nn.CrossEntropyLoss(**loss))
        learn.fit(2, 1e-2, cbs=JoCorCallback(k=3, seed=1, plus=plus))
        return weights(learn.model)
    loose,seen = trained(),[]
    as_on_a_gpu(monkeypatch, seen)
    tight = trained()
    assert seen and all(torch.allclose(p, q, atol=1e-5) for p,q in zip(loose, tight, strict=True))

def test_a_step_on_a_gpu(plus, monkeypatch):
    seen = watch(monkeypatch)
    digits().fit(2, 1e-3, cbs=JoCorCallback(k=3, plus=plus))
    assert len(seen) == 2 and all(o.device.type == 'cuda' and len(o) for cols in seen for o in cols.values())

def test_hidden_items_give_no_gradient(plus):
    "To the peer that they are hidden from; others learn from all of them that are kept or voted for"
    learn,seen = digits64(),[]
    cb = JoCorCallback(k=3, co_lambda=.5, models=mlps64(3), plus=plus)
    learn.fit(1, 1e-2, cbs=cb)
    def look(l):
        s = l.selection
        z = s.logits.clone().requires_grad_()
        s.log_probs = z.log_softmax(-1)
        cb.weigh.loss(z, s.targ)[0].backward()
        hidden = s.evidence.hidden[s.idx] == torch.arange(3)[:,None]
        got = (z.grad != 0).any(-1)
        assert not got[hidden].any()
        seen.append(int((got.any(0) & hidden.any(0) & (s.kept == 0)).sum()))
    learn.fit(1, 1e-2, cbs=[cb, Step(look)])
    assert sum(seen) > 20

def test_what_is_known_follows_the_learner_to_another_device(plus):
    learn,cb = digits(),JoCorCallback(k=2, plus=plus)
    learn.fit(1, 1e-3, cbs=cb)
    e,cb.learn = cb.evidence,learn
    cb.weigh.before_fit()
    assert cb.evidence is e
    cb.selection.device = torch.device('meta') # a device without values
    cb.weigh.before_fit()
    known = [cb.evidence, cb.evidence.untold, *filter(None, [cb.early])]
    tensors = [o for d in known for o in vars(d).values() if isinstance(o, torch.Tensor)]
    assert len(tensors) > 5 and all(o.is_meta for o in tensors)
    assert cb.evidence.rows == e.rows and len(known) == 2+(plus == 'early')

def test_several_labels_are_refused(plus):
    x,y = torch.randn(64, 4),torch.randint(0, 2, (64, 3)).float()
    learn = tensors(x, y, nn.Linear(4, 3), loss_func=BCEWithLogitsLossFlat())
    model,before = learn.model,weights(learn.model)
    with pytest.raises(ValueError, match=f"plus='{plus}' needs one class per item"):
        learn.fit(1, cbs=JoCorCallback(plus=plus))
    assert learn.model is model and same(before, weights(model))

def test_data_without_a_hidden_item_are_refused(plus):
    learn = digits()
    model,before = learn.model,weights(learn.model)
    with pytest.raises(ValueError, match=f"plus='{plus}' needs items .* hidden=0.0001 of .* hides none"):
        learn.fit(1, cbs=JoCorCallback(plus=plus, hidden=1e-4))
    assert learn.model is model and same(before, weights(model))

REFUSED = [(dict(hidden=0), 'hidden=0 hides none'), (dict(balance=.5), "needs rule='evidence'"),
           (dict(rule='schedule'), "needs rule='evidence'")]

@pytest.mark.parametrize('kw,error', REFUSED)
def test_what_is_refused(kw, error, plus):
    with pytest.raises(ValueError, match=error): JoCorCallback(plus=plus, **kw)

@pytest.mark.parametrize('kw,error', [('vote', "did you mean 'votes'"), ('earl', "did you mean 'early'"),
                                      (True, 'plus=True must be')])
def test_other_names_are_refused(kw, error):
    with pytest.raises(ValueError, match=error): JoCorCallback(plus=kw)

def test_repr(plus): assert f'plus={plus!r}' in repr(JoCorCallback(plus=plus)) and 'plus' not in repr(JoCorCallback())
