"Audits of texts, of bodies that know the labels, of items without labels, and what cannot be audited."
import random, warnings, numpy as np, pytest, torch
from fastai.vision.all import (BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader,
                               DataLoaders, Learner, nn, RandomSplitter, set_seed, TransformBlock)
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from fastai_jocor.all import audit_labels, digits_dls, feature_dls, feature_learner, JoCorCallback, jocor_mlp, Symmetric
import fastai_jocor.judge as judge, fastai_jocor.trust as trust
from learners import quiet
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

# --- a body that knows the labels

def two_parts(n_out=10):
    "A body and a head"
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, n_out)))

def trained(epochs, cbs=None, splitter=None, noise=Symmetric(.3)):
    set_seed(0)
    kwargs = {} if splitter is None else dict(splitter=splitter)
    learn = quiet(Learner(digits_dls(noise=noise), two_parts(), **kwargs))
    if epochs: learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
    return learn

def test_labels_learned_by_heart(tmp_path):
    learn = trained(60)
    with pytest.warns(UserWarning, match='learned these labels by heart.*features=False'):
        audit = audit_labels(learn, folder=tmp_path, progress=False)
    assert audit.by_heart and not audit.trusted and audit.learned
    assert 'by heart' in str(audit) and 'by heart' in repr(audit)
    with pytest.warns(UserWarning, match='by heart'): s = audit.suspects()
    assert 'by heart' in s.attrs['summary']['warning'] and not s.attrs['summary']['trusted']
    again = audit_labels(learn, features=False, progress=False)
    wrong = again.table.flipped[again.table.part == 'train'].astype(bool)
    assert again.trusted and (again.table.p_wrong[wrong.index][wrong] > .5).mean() > .8

@pytest.mark.parametrize('epochs,callback', [(0, None), (3, None), (20, JoCorCallback)])
def test_labels_not_learned_by_heart(tmp_path, epochs, callback):
    audit = audit_labels(trained(epochs, callback and callback(k=2)), folder=tmp_path, progress=False)
    assert audit.trusted and not audit.by_heart

def a_judgement(right, n=1000):
    "Judgement of `n` labels, a share of which the heads predict"
    said = np.log(np.full((3,n,2), .5, dtype=np.float32))
    said[:,:int(right*n),0] += .1
    said[:,int(right*n):,1] += .1
    return judge.Judgement(said, np.arange(n)%3, np.zeros(n, dtype=int))

@pytest.mark.parametrize('own,train,valid,want', [
    (1., .8, .8, True), (.82, .8, .8, False), (.9, .9, .8, True), (.9, .9, .87, False), (.5, .9, .8, False)])
def test_by_heart(monkeypatch, own, train, valid, want):
    "The learner's own model, and heads on training and validation items"
    monkeypatch.setattr(trust, '_own_votes', lambda learn, some: np.where(np.arange(len(some)) < own*len(some), 0, 1))
    learn,of = Learner(digits_dls(), two_parts()),(a_judgement(train), a_judgement(valid))
    assert trust.by_heart(learn, *of) == want
    assert trust.by_heart(learn, of[0]) == (want and own > train)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    assert not trust.by_heart(learn, *of)

# --- items without a label

DIGITS = load_digits()
PIXELS = torch.tensor(DIGITS.data/16).float()

@pytest.fixture(scope='module')
def without_labels():
    "Digits, one in four without a label, one in ten with a wrong one; and which labels are wrong"
    rng = np.random.default_rng(0)
    none,wrong = rng.random((2,len(PIXELS))) < [[.25],[.1]]
    return none, wrong & ~none, np.where(wrong, (DIGITS.target+1)%10, DIGITS.target)

def with_na(none, given):
    "The class #na# stands for a missing label"
    names = np.where(none, np.nan, given.astype(str).astype(object))
    block = DataBlock((TransformBlock, CategoryBlock(add_na=True)), getters=[PIXELS.__getitem__, names.__getitem__],
                      splitter=RandomSplitter(seed=0))
    dls = block.dataloaders(range(len(PIXELS)), num_workers=0)
    return Learner(dls, two_parts(11), loss_func=CrossEntropyLossFlat(ignore_index=0))

def with_code(code, none, given):
    items = list(zip(PIXELS, torch.where(torch.tensor(none), code, torch.tensor(given))))
    dls = DataLoaders(DataLoader(items[:1400], bs=64, shuffle=True), DataLoader(items[1400:], bs=64))
    return Learner(dls, jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat(ignore_index=code))

@pytest.mark.parametrize('make', [with_na, *(lambda *args, c=c: with_code(c, *args) for c in (-100,-1))],
                         ids=['na','-100','-1'])
def test_items_without_a_label_are_not_judged(without_labels, tmp_path, make):
    none,wrong,given = without_labels
    set_seed(0)
    audit = audit_labels(make(none, given), folder=tmp_path, progress=False)
    t = audit.table
    at = t['item'] if t['item'].is_unique else t.index # names, or positions in each part
    assert t.p_wrong.isna().tolist() == none[at].tolist() == (audit.labels == -1).tolist()
    assert t.given_label.isna().tolist() == none[at].tolist() and '#na#' not in set(t.predicted_label)
    e = audit.expected_wrong()
    assert e['n'] == (~none).sum() and e['low'] <= wrong.sum() <= e['high'] and abs(e['expected']-wrong.sum()) < 60
    assert not none[at][audit.suspects(least=0.).index].any()
    s = audit.suspects()
    assert wrong[at][s.index].mean() > .8 and len(s) > .7*wrong.sum()
    assert np.allclose(audit.pred_probs.sum(1), 1)

def test_a_validation_set_without_labels(without_labels):
    none,_,given = without_labels
    audit = audit_labels(with_code(-100, none | (np.arange(len(none)) >= 1400), given), epochs=3, progress=False)
    assert audit.expected_wrong('valid') == dict(expected=0, low=0, high=0, n=0) and 'labels are wrong' in str(audit)

def test_an_item_without_a_label_contradicts_no_other():
    x,y = PIXELS.clone(),DIGITS.target.astype(str).astype(object)
    x[1],x[3] = x[0],x[2]
    y[1],y[3] = np.nan,'8'
    block = DataBlock((TransformBlock, CategoryBlock(add_na=True)), getters=[x.__getitem__, y.__getitem__],
                      splitter=RandomSplitter(0.))
    learn = Learner(block.dataloaders(range(len(x)), num_workers=0), two_parts(11),
                    loss_func=CrossEntropyLossFlat(ignore_index=0))
    audit = audit_labels(learn, epochs=1, progress=False)
    pairs = audit.duplicates().set_index('item')
    notes = audit.table.set_index('item').note
    first = lambda a,b: a if a in pairs.index and pairs.item_2[a] == b else b
    assert pairs.same_label[first(0, 1)] and not pairs.same_label[first(2, 3)]
    assert not notes[0] and notes[1] == 'almost equal to 0, labelled 0' and 'labelled 8' in notes[2]

# --- splits, random states, types

def split_digits(split, labels=DIGITS.target):
    block = DataBlock((TransformBlock, CategoryBlock), getters=[PIXELS.__getitem__, labels.__getitem__], splitter=split)
    return block.dataloaders(range(len(PIXELS)), num_workers=0)

@pytest.mark.parametrize('valid', [300, 0])
def test_a_third_set_is_left_alone(tmp_path, valid):
    dls = split_digits(lambda items: (range(1000), range(1000, 1000+valid), range(1300, 1797)))
    audit = audit_labels(Learner(dls, two_parts(), loss_func=CrossEntropyLossFlat()), folder=tmp_path, epochs=2,
                         progress=False)
    assert audit.table['item'].tolist() == list(range(1000+valid))
    assert [len(dl.dataset) for dl in feature_dls(audit.learn, tmp_path, progress=False).loaders] == [1000, valid, 497]

@pytest.mark.parametrize('features', [True, False])
def test_random_states_are_left_alone(tmp_path, features):
    "The learner's own loader has one as well"
    learn = trained(0)
    draw = lambda: (torch.rand(1).item(), np.random.rand(), random.random(), learn.dls.train.get_idxs()[:5])
    set_seed(5)
    learn.dls.train.rng.seed(0)
    want = draw()
    set_seed(5)
    learn.dls.train.rng.seed(0)
    audit = audit_labels(learn, folder=tmp_path, features=features, epochs=1, progress=False)
    assert draw() == want
    again = audit_labels(learn, folder=tmp_path, features=features, epochs=1, progress=False, seed=0)
    assert features is False or again.table.p_wrong.equals(audit.table.p_wrong)

def test_flipped_is_a_nullable_boolean(digits):
    t = audit_labels(digits, epochs=1, progress=False).table
    train = t[t.part == 'train']
    assert t.flipped.dtype == 'boolean' and t.flipped.isna().tolist() == (t.part == 'valid').tolist()
    assert train.flipped.tolist() == digits.dls.noise.flipped.tolist()
    assert 0 < average_precision_score(train.flipped, train.p_wrong) <= 1

def test_more_outputs_than_classes():
    "An output without a class has a name of its own"
    dls = split_digits(RandomSplitter(seed=0))
    learn = quiet(Learner(dls, jocor_mlp(12, 64), loss_func=CrossEntropyLossFlat()))
    audit = audit_labels(learn, epochs=1, progress=False)
    assert set(audit.table.given_label) == set('0123456789')
    bias = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1].bias
    with torch.no_grad(): bias[11] = 50.
    learn.fit(1, 0., cbs=(cb := JoCorCallback(k=2, rule='schedule', forget_rate=.1)))
    assert set(cb.ledger.predicted_label.dropna()) == {'output 11'}
    cb.suspects()

def test_an_audit_of_features_asks_no_body(tmp_path):
    "A learner that has features for data has no body that could know the labels"
    learn = feature_learner(quiet(Learner(digits_dls(noise=Symmetric(.3), seed=0), two_parts(), path=tmp_path)))
    audit = audit_labels(learn, progress=False, epochs=3)
    assert not audit.by_heart and len(audit.table)
