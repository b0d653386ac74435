"Audits of texts, and what cannot be audited."
import numpy as np, pytest, torch
from fastai.vision.all import BCEWithLogitsLossFlat, Learner
from fastai_jocor.all import audit_labels, digits_dls, feature_learner, JoCorCallback, jocor_mlp, Symmetric
import fastai_jocor.judge as judge
from text_learners import review_learner, reviews

@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    df = reviews(400)
    return df, review_learner(df, tmp_path_factory.mktemp('reviews'))

def test_texts(texts):
    df,learn = texts
    audit = audit_labels(learn, progress=False)
    wrong = df.wrong[audit.table['item']].to_numpy()
    s = audit.suspects()
    assert wrong[s.index].mean() > .8 and wrong[s.index].sum() > wrong.sum()/2
    e = audit.expected_wrong()
    assert e['low'] <= wrong.sum() <= e['high'] and e['n'] == len(df)
    assert len(audit.plot(4)) == 4

def test_heads_go_back_on_an_encoder(texts):
    df,learn = texts
    heads = feature_learner(learn)
    with learn.no_bar(): learn.validate() # leaves tensors in the encoder that cannot be copied
    with heads.no_bar(), heads.no_logging(): heads.fit_one_cycle(3, 3e-3, cbs=JoCorCallback(k=2))
    with learn.no_bar(): learn.take_heads(heads)
    with learn.no_bar(), heads.no_bar(): of_texts,of_features = learn.get_preds()[0],heads.get_preds()[0]
    assert torch.allclose(of_texts, of_features, atol=1e-2) and learn.model.k == 2

def test_an_encoder_is_fine_tuned(tmp_path):
    learn = review_learner(reviews(60), tmp_path)
    before = {n: o.clone() for n,o in learn.model.state_dict().items()}
    audit = audit_labels(learn, epochs=1, fine_tune=1, progress=False)
    assert audit.heads.dls is learn.dls and len(audit.table) == 60
    assert all(torch.equal(o, before[n]) for n,o in learn.model.state_dict().items())

@pytest.fixture(scope='module')
def digits():
    torch.manual_seed(0)
    return Learner(digits_dls(noise=Symmetric(.2)), jocor_mlp(10, 64))

BAD = [(dict(epochs=0), 'epochs=0 must be an integer of at least 1'), (dict(epochs=1.5), 'epochs=1.5'),
       (dict(lr=0), 'lr=0 must be above 0'), (dict(lr=-1.), 'lr=-1.0'), (dict(fine_tune=-1), 'fine_tune=-1'),
       (dict(fine_tune=2), 'fine_tune=2 needs features'), (dict(hidden=.5), 'hidden=0.5 cannot be chosen'),
       (dict(rule='schedule'), "rule='schedule' cannot be chosen")]

@pytest.mark.parametrize('bad,message', BAD, ids=lambda o: str(o)[:20])
def test_bad_arguments_are_refused_before_training(digits, monkeypatch, bad, message):
    def no_training(**kwargs): raise AssertionError('training has begun')
    monkeypatch.setattr(judge, 'JoCorCallback', no_training)
    with pytest.raises(ValueError, match=message): audit_labels(digits, progress=False, **bad)

def test_several_labels_an_item_are_refused(digits):
    learn = Learner(digits.dls, digits.model, loss_func=BCEWithLogitsLossFlat())
    with pytest.raises(ValueError, match='several labels per item'): audit_labels(learn, progress=False)

def test_bad_questions(digits):
    audit = audit_labels(digits, epochs=1, progress=False)
    with pytest.raises(ValueError, match="part='test' must be"): audit.expected_wrong('test')
    with pytest.raises(ValueError, match='n=-1 must be'): audit.suspects(-1)
