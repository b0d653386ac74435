"Class weights, smoothed labels and items without a label, under both rules."
import copy, pytest, re, torch
from functools import lru_cache, partial
import torch.nn.functional as F
from fastai.vision.all import Callback, DataLoader, DataLoaders, Learner, nn
from fastai.losses import BaseLoss, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai_jocor.all import JoCorCallback, jocor_mlp
from fastai_jocor.per_sample import another_mean, class_weights, ignored_label, without_weights
from fastai_jocor.lab.run import fast_adam
from learners import Record, Step, digits64, finite, mlps64, quiet
from sklearn.datasets import load_digits
import reference

WEIGHT = torch.linspace(.2, 3, 10, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')
RULES = 'evidence','schedule'

def by_rule(rule, **kwargs):
    return JoCorCallback(rule=rule, **(kwargs if rule == 'evidence' else dict(forget_rate=.4, num_gradual=0) | kwargs))

# --- class weights

class FloatLoss(Callback):
    "fastai's table takes no loss in float64"
    def after_loss(self): self.learn.loss = self.learn.loss.float()

@pytest.mark.parametrize('kw', (dict(weight=WEIGHT), dict(weight=WEIGHT, label_smoothing=.2), dict(label_smoothing=.2)))
def test_one_network_that_drops_nothing_is_plain_training(kw):
    plain,single = digits64(),digits64()
    for learn in (plain,single): learn.loss_func = nn.CrossEntropyLoss(**kw)
    net = copy.deepcopy(plain.model)
    plain.fit(2, 2e-3, cbs=FloatLoss())
    single.fit(2, 2e-3, cbs=JoCorCallback(k=1, models=[net], forget_rate=0., rule='schedule'))
    reference.assert_same_weights([plain.model], single.model.peers, atol=1e-9)
    assert plain.recorder.values[-1][1] == pytest.approx(single.recorder.values[-1][1], rel=1e-5)

class SameCE(nn.CrossEntropyLoss): "A subclass with nothing of its own"
class Twice(nn.CrossEntropyLoss):
    def forward(self, z, y): return 2*super().forward(z, y)

def log_probs(learn):
    "A learner whose model ends in log-probabilities, as `nll_loss` takes them"
    learn.model.append(nn.LogSoftmax(-1))
    return learn

SETTINGS = dict(weight=WEIGHT),dict(ignore_index=3),dict(weight=WEIGHT, ignore_index=3)
MAKES = (SameCE, nn.NLLLoss, lambda **kw: partial(F.cross_entropy, **kw), lambda **kw: partial(F.nll_loss, **kw))

@pytest.mark.parametrize('kw', SETTINGS, ids=('weight','ignored','both'))
@pytest.mark.parametrize('make', MAKES, ids=('subclass','nll','partial','partial nll'))
@pytest.mark.filterwarnings('error:loss_func')
def test_other_cross_entropies_train_alike(make, kw):
    "One network that drops nothing is trained as without the callback, and knows weights and the ignored label"
    plain,single = digits64(),digits64()
    loss = make(**kw)
    for learn in (plain,single):
        if 'nll' in repr(loss).lower(): log_probs(learn)
        learn.loss_func = loss
    net = copy.deepcopy(plain.model)
    plain.fit(1, 2e-3, cbs=FloatLoss())
    seen = []
    cb = JoCorCallback(k=1, models=[net], forget_rate=0., rule='schedule')
    single.fit(1, 2e-3, cbs=[cb, Step(lambda l: seen.append((l.selection.weight, l.selection.no_label)))])
    reference.assert_same_weights([plain.model], single.model.peers, atol=1e-9)
    weight,no_label = seen[0]
    assert weight is kw.get('weight') or torch.equal(weight, kw['weight'])
    assert no_label == kw.get('ignore_index', -100)

def test_what_fastai_wraps():
    loss = BaseLoss(nn.NLLLoss, weight=WEIGHT, ignore_index=3)
    assert ignored_label(loss) == 3 and class_weights(without_weights(loss)) is None
    assert torch.equal(class_weights(loss), WEIGHT)
    assert class_weights(Twice(weight=WEIGHT)) is ignored_label(Twice()) is None

@pytest.mark.parametrize('loss,text', (
    (LabelSmoothingCrossEntropyFlat(weight=WEIGHT.float()), r'CrossEntropyLossFlat\(weight='),
    (Twice(weight=WEIGHT), r'CrossEntropyLossFlat\(weight='), (Twice(ignore_index=3), 'mean of its losses per item'),
    (nn.CrossEntropyLoss(reduction='sum'), "it is their sum; pass reduction='mean'"),
    (partial(F.cross_entropy, reduction='sum'), "it is their sum; pass reduction='mean'")))
def test_a_loss_that_is_another_mean(loss, text):
    "One warning, before training"
    learn = digits64()
    learn.loss_func = loss
    with pytest.warns(UserWarning, match='loss_func=.* on a batch, and the mean') as seen:
        learn.fit(2, 0., cbs=[JoCorCallback(k=1, forget_rate=0., rule='schedule'), FloatLoss()])
    told, = [str(o.message) for o in seen if 'on a batch, and the mean' in str(o.message)]
    assert re.search(text, told)

def test_a_loss_that_draws_or_remembers():
    "Is compared with the same draws, and what it remembers and the global random state stay"
    class Noisy(nn.Module):
        reduction,n = 'mean',0
        def forward(self, z, y):
            self.n += 1
            each = F.cross_entropy(z, y, reduction='none')*torch.rand(len(y))
            return each if self.reduction == 'none' else each.mean()
    loss,z,y = Noisy(),torch.randn(20,3),torch.randint(0,3,(20,))
    state = torch.get_rng_state()
    assert another_mean(loss, z, y) is None and loss.n == 0
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize('loss', (F.cross_entropy, LabelSmoothingCrossEntropyFlat(), FocalLossFlat(),
    FocalLossFlat(weight=WEIGHT[:3].float()), nn.MultiMarginLoss(),
    lambda z,y: F.cross_entropy(z, y, reduction='none')))
def test_losses_that_are_their_mean(loss):
    assert another_mean(loss, torch.randn(20,3), torch.randint(0,3,(20,))) is None

def test_losses_that_cannot_be_compared():
    "No item has a label; the loss fails"
    z,y = torch.randn(5,3),torch.full((5,), -100)
    assert another_mean(nn.CrossEntropyLoss(), z, y) is None
    assert another_mean(lambda z,y: z[9], z, y) is None

@lru_cache
def trained():
    learn,nets = digits64(),mlps64(2)
    learn.fit(3, 5e-3, cbs=JoCorCallback(models=nets))
    return nets

@pytest.mark.parametrize('smoothing', (0., .1))
@pytest.mark.parametrize('rule', RULES)
def test_weights_do_not_change_what_is_kept(rule, smoothing):
    nets,found = trained(),[]
    for weight in (None,WEIGHT):
        learn,kept = digits64(),[]
        learn.loss_func = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
        cb = by_rule(rule, models=copy.deepcopy(nets))
        step = Step(lambda l: kept.append((sorted(l.selection.kept.tolist()), l.selection.losses.tolist())))
        learn.fit(2, 0., cbs=[cb, step])
        found.append(kept)
        assert cb.history.kept.iloc[-1] < .8
    assert found[0] == found[1]

@pytest.mark.parametrize('smoothing', (0., .1))
@pytest.mark.parametrize('rule', RULES)
def test_the_mean_is_weighted(rule, smoothing):
    "As torch's own: the sum of weighted losses through the sum of the weights, the contrast weighted alike"
    learn,nets,seen = digits64(),trained(),[]
    learn.loss_func = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=smoothing)
    def look(l):
        s = l.selection
        times = s.kept if s.kept.is_floating_point() else torch.zeros(len(s.targ)).index_fill(0, s.kept, 1)
        seen.append((l.loss_grad.item(), s.logits, s.targ, times > 0))
    learn.fit(2, 0., cbs=[by_rule(rule, models=copy.deepcopy(nets), co_lambda=.3), Step(look)])
    for loss,logits,y,kept in seen:
        own = F.cross_entropy(logits.flatten(0, 1), y.repeat(2), WEIGHT, reduction='none', label_smoothing=smoothing)
        apart = reference.kl(*logits)+reference.kl(*logits.flip(0))
        items = .7*own.view(2, -1).sum(0)+.3*WEIGHT[y]*apart
        assert loss == pytest.approx((items[kept].sum()/WEIGHT[y[kept]].sum()).item(), rel=1e-9)
    assert any(not kept.all() for *_,kept in seen)

def test_lr_find_sees_the_weighted_loss():
    learn,first = digits64(WEIGHT),[]
    learn.add_cb(Step(lambda l: first.append((l.loss_grad.item(), l.selection.logits, l.selection.targ))))
    learn.add_cb(JoCorCallback(k=1))
    learn.lr_find(num_it=10, show_plot=False)
    loss,logits,y = first[0]
    assert loss == pytest.approx(F.cross_entropy(logits[0], y, WEIGHT).item(), rel=1e-9)

# --- items without a label

N = 600 # items
PIXELS = torch.as_tensor(load_digits().data/16)

def partly_labelled(no_label, without, other=False, bs=64, n=N):
    "`digits64`, whose items `without` have no label; `other`: these show something else"
    learn = digits64(bs=bs)
    y = torch.stack([y for _,y in learn.dls.train.dataset])[:n].masked_fill(without[:n], no_label)
    x = PIXELS[:n].clone()
    if other: x[without[:n]] = 4*x[without[:n]].flip(-1)+1
    dls = DataLoaders(DataLoader(list(zip(x, y)), bs=bs, shuffle=True), learn.dls.valid)
    loss = nn.CrossEntropyLoss(ignore_index=no_label)
    return quiet(Learner(dls, jocor_mlp(10, 64).double(), loss_func=loss, opt_func=fast_adam)),y

A_FIFTH = torch.rand(N, generator=torch.Generator().manual_seed(0)) < .2
FEW = torch.isin(torch.arange(N), torch.tensor([7,500,501]))

def fitted(rule, no_label, without, other=False, k=2, epochs=4):
    learn,y = partly_labelled(no_label, without, other)
    rec,kept,nets = Record(),[],mlps64(k)
    cb = by_rule(rule, k=k, models=nets)
    learn.dls.train.rng.seed(1)
    learn.fit(epochs, 1e-2, cbs=[cb, rec, Step(lambda l: kept.append(l.selection.kept.clone()))])
    return learn,cb,rec,kept,y

CASES = [(rule,no_label,without) for rule in RULES for no_label,without in ((-100,A_FIFTH), (3,A_FIFTH), (10,FEW))]

@pytest.mark.parametrize('rule,no_label,without', CASES)
def test_items_without_a_label_leave_no_trace(rule, no_label, without):
    learn,cb,rec,kept,y = fitted(rule, no_label, without)
    none = y == no_label
    n,by_epoch = int((~none).sum()),[0.]*4
    for (epoch,_,y_batch),places in zip(rec.batches, kept):
        mask = places > 0 if places.is_floating_point() else torch.zeros(len(y_batch)).index_fill(0, places, 1) > 0
        assert not mask[y_batch == no_label].any()
        by_epoch[epoch] += mask.sum().item()/n
    assert cb.history.kept.tolist() == pytest.approx(by_epoch) and .3 < by_epoch[-1] < .97
    items = cb.items.frame()
    assert (items.seen[none.numpy()] == 0).all() and (items.given_label[none.numpy()] == -1).all()
    assert (items.seen[~none.numpy()] == 4).all() and (items.given_label[~none.numpy()] == y[~none].numpy()).all()
    if rule == 'schedule': return
    assert cb.evidence.rows[-1]['n'] == int(((cb.evidence.hidden >= 0) & ~none).sum())
    assert cb.evidence.margin[none].isnan().all() and cb.evidence.margin[~none].isfinite().all()

@pytest.mark.parametrize('k', (1,2))
@pytest.mark.parametrize('rule,no_label', ((RULES[0],-100), (RULES[0],3), (RULES[1],-100), (RULES[1],3)))
def test_what_is_in_their_pictures_is_all_the_same(rule, no_label, k):
    (a,cb,*_),(b,other,*_) = [fitted(rule, no_label, A_FIFTH, o, k, 2) for o in (False,True)]
    reference.assert_same_weights(a.model.peers, b.model.peers, atol=1e-8)
    assert cb.history.drop(columns='non_finite').equals(other.history.drop(columns='non_finite'))
    if rule == 'evidence': torch.testing.assert_close(cb.evidence.running, other.evidence.running)

@pytest.mark.parametrize('rule', RULES)
def test_the_share_is_of_items_with_a_label(rule):
    learn,cb,*_ = fitted(rule, -100, A_FIFTH)
    counts = []
    if rule == 'evidence': cb.evidence.brake,cb.evidence.without = .3,('margin','guess')
    def count(l):
        s = l.selection
        counts.append((int((~s.ignored).sum()), int(s.kept.sum())))
    learn.fit(1, 0., cbs=[cb, Step(count)])
    R,rate = cb.history.R.iloc[-1],dict(evidence=.3, schedule=.4)[rule]
    assert R == rate
    labelled,dropped = (torch.tensor(o).cumsum(0) for o in zip(*[(n, n-kept) for n,kept in counts]))
    owed = rate*labelled-dropped # what is left goes to the next batch
    assert owed.min() > -1e-4 and owed.max() < 1 and (labelled.diff()*rate % 1 > .01).any()

def test_the_official_rounding_counts_items_with_a_label():
    learn,_ = partly_labelled(-100, A_FIFTH)
    counts = []
    def count(l): counts.append((int((~l.selection.ignored).sum()), int(l.selection.kept.sum())))
    cb = JoCorCallback(k=2, rule='schedule', forget_rate=.4, num_gradual=0, rounding='official')
    learn.fit(1, 0., cbs=[cb, Step(count)])
    assert [kept for _,kept in counts] == [int((1-.4)*n) for n,_ in counts]

@pytest.mark.parametrize('rule', RULES)
def test_a_batch_without_any_label(rule):
    "Also with class weights, whose sum is 0 then"
    learn,y = partly_labelled(-100, A_FIFTH, bs=2, n=120)
    learn.loss_func = nn.CrossEntropyLoss(weight=WEIGHT)
    losses = []
    learn.fit(2, 1e-3, cbs=[by_rule(rule, k=1), Step(lambda l: losses.append(l.loss_grad.item()))])
    assert torch.tensor(losses).isfinite().all() and 0. in losses and finite(learn.model)
