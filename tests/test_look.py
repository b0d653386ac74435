"The look at the labels before a pretrained body is trained."
import numpy as np, pandas as pd, pytest, torch, torchvision
from functools import partial
from fastai.vision.all import (accuracy, Callback, DataBlock, get_image_files, ImageBlock, Learner, params,
    parent_label, RandomSplitter, Resize, resnet18, set_seed, vision_learner)
from fastai_jocor import judge, look
from fastai_jocor.all import (audit_labels, cleaned, feature_learner, JoCorCallback, LabelAudit, NoiseEstimate,
    NoisyCategoryBlock, Symmetric)
from fastai_jocor.feature_loaders import given_labels
from fastai_jocor.evidence import Evidence, evidence_state, load_evidence
from fastai_jocor.judge import Judgement
from learners import digits, quiet, same, weights
from pictures import digit_files

def pictures(folder, n=1500, noise=Symmetric(.25)):
    block = DataBlock((ImageBlock, NoisyCategoryBlock(noise, seed=0)), get_items=lambda p: get_image_files(p).sorted(),
                      get_y=parent_label, splitter=RandomSplitter(seed=0), item_tfms=Resize(32))
    return block.dataloaders(digit_files(folder, n), bs=32, num_workers=0)

def pretrained(dls, **kwargs):
    "A network of torchvision whose normalisation layers look pretrained, in a plain learner"
    set_seed(0)
    net = torchvision.models.resnet18(num_classes=3)
    net.avgpool = torch.nn.Sequential(net.avgpool, torch.nn.Dropout(.2)) # it draws random numbers
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.uniform_(m.weight, .8, 1.2)
    set_seed(0)
    return quiet(Learner(dls, net, metrics=accuracy, **kwargs))

@pytest.fixture(scope='module')
def dls(tmp_path_factory): return pictures(tmp_path_factory.mktemp('digits'))

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setattr('fastai_jocor.features.xdg_cache_home', lambda: tmp_path/'cache')

@pytest.fixture(autouse=True)
def few(monkeypatch): monkeypatch.setattr(judge, 'sure_rate', partial(judge.sure_rate, least=225))

@pytest.fixture
def looks(monkeypatch):
    "How often the callback looks, and nothing is found"
    seen = []
    monkeypatch.setattr(JoCorCallback, 'first_look', staticmethod(lambda learn: seen.append(learn)))
    return seen

def test_items_that_are_found_are_never_trained_on(dls):
    learn,cb = pretrained(dls),JoCorCallback(k=2)
    learn.fit(2, 1e-3, cbs=cb)
    barred,wrong = cb.evidence.barred.cpu().numpy() >= 0,dls.noise.flipped
    assert wrong[barred].mean() > .7 and wrong[barred].sum() > .5*wrong.sum()
    seen = cb.items.seen.cpu().numpy() > 0
    kept = cb.items.kept.cpu().numpy()
    assert not kept[barred].any() and (kept[~barred & seen] > 0).mean() > .95
    assert cb.ledger.prob[barred & seen].notna().all() # they are observed all the same

def test_a_look_that_finds_nothing_changes_nothing(dls, monkeypatch):
    def fitted(cb):
        learn = pretrained(dls)
        learn.fit(1, 1e-3, cbs=cb)
        return weights(learn)
    monkeypatch.setattr(LabelAudit, 'trusted', False)
    with_look = fitted(JoCorCallback(k=2, seed=1))
    same(with_look, fitted(JoCorCallback(k=2, seed=1, without=('look',))))

def test_the_callback_looks_once(dls, looks):
    learn,cb = pretrained(dls),JoCorCallback(k=2)
    learn.add_cb(cb)
    learn.lr_find(num_it=3, show_plot=False)
    assert not looks
    for _ in range(2): learn.fit(1, 1e-3)
    assert len(looks) == 1
    pretrained(dls).fit(1, 1e-3, cbs=JoCorCallback(k=2, without=('look',)))
    pretrained(dls).fit(1, 1e-3, cbs=JoCorCallback.paper(forget_rate=.2))
    assert len(looks) == 1

def as_pretrained(learn):
    "With the normalisation layers of a pretrained body"
    for m in learn.model[0].modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.uniform_(m.weight, .8, 1.2)
    return quiet(learn)

def test_what_is_looked_at(dls):
    learn = as_pretrained(vision_learner(dls, resnet18, pretrained=False))
    assert look.is_pretrained(learn) and look.is_pretrained(pretrained(dls))
    learn.freeze()
    assert look.is_pretrained(learn)
    assert not look.is_pretrained(vision_learner(dls, resnet18, pretrained=False))
    assert not look.is_pretrained(quiet(Learner(dls, torchvision.models.resnet18(num_classes=3))))
    assert not look.is_pretrained(feature_learner(learn))
    learn.fit(1, 1e-3)
    assert not look.is_pretrained(learn)

def test_a_frozen_body_is_looked_at_once_before_fine_tuning(dls):
    learn,cb = as_pretrained(vision_learner(dls, resnet18, pretrained=False)),JoCorCallback(k=2)
    learn.fine_tune(2, 1e-3, freeze_epochs=2, cbs=cb)
    barred,wrong = cb.evidence.barred.cpu().numpy() >= 0,dls.noise.flipped
    assert wrong[barred].mean() > .7 and wrong[barred].sum() > .5*wrong.sum()
    assert not cb.items.kept.cpu().numpy()[barred].any() and len(cb.history) == 4
    assert (cb.items.kept.cpu().numpy()[~barred] > 0).mean() > .9
    assert cb.estimate.low < wrong.mean() < cb.estimate.high
    assert cb.estimate.rate == cb.evidence.known.rate == cb.evidence.told

def test_layers_are_in_training_mode_after_the_look(dls):
    seen = []
    class Watch(Callback):
        order = 20
        def before_batch(self):
            if self.training: seen.append(all(m.training for m in self.model.modules()))
    as_pretrained(vision_learner(dls, resnet18, pretrained=False)).fit(1, 1e-3, cbs=[JoCorCallback(k=2), Watch()])
    assert seen and all(seen)

def test_the_audit_of_a_learner_does_not_look_first(dls, looks):
    audit_labels(pretrained(dls), k=2, epochs=1, features=False, progress=False)
    audit_labels(as_pretrained(vision_learner(dls, resnet18, pretrained=False)), epochs=1, fine_tune=1, progress=False)
    assert not looks

def test_a_look_that_fails_is_no_obstacle(dls, monkeypatch):
    def fail(*args, **kwargs): raise RuntimeError('no space left')
    monkeypatch.setattr(look, 'audit_labels', fail)
    learn,cb = pretrained(dls),JoCorCallback(k=2)
    with pytest.warns(UserWarning, match='could not be looked at before training .RuntimeError: no space left.'):
        learn.fit(1, 1e-3, cbs=cb)
    assert cb.evidence.barred is None and len(cb.history) == 1

def test_barred_items_count_towards_the_share_to_drop(monkeypatch):
    learn = digits(noise=Symmetric(.3))
    wrong = torch.as_tensor(learn.dls.noise.flipped)
    given = torch.as_tensor(given_labels(learn.dls.train))
    known = NoiseEstimate(.3, .3, .3, 0., True, .2, .4)
    monkeypatch.setattr(JoCorCallback, 'first_look', staticmethod(lambda learn: (wrong.float(), given, known)))
    cb = JoCorCallback(k=2, forget_rate=.3)
    learn.fit_one_cycle(12, 1e-2, cbs=cb)
    last = cb.history.iloc[-1]
    assert last.label_precision == 1 and last.kept > .6 and (cb.estimate.low,cb.estimate.high) == (.2,.4)

def test_what_is_barred_outlasts_an_interruption():
    e = Evidence(6, 2, 3)
    e.barred,e.known = torch.tensor([2,-1]*3),NoiseEstimate(.3, .3, .3, 0., True, .2, .4)
    state = evidence_state(e)
    again = load_evidence(Evidence(6, 2, 3), state)
    assert torch.equal(again.barred, e.barred) and again.known == e.known and again.told == .3
    del state['barred'],state['known'] # as written by an earlier version
    again = load_evidence(Evidence(6, 2, 3), state)
    assert again.barred is None and again.told is None

def test_items_whose_labels_were_corrected_are_trained_on(dls):
    learn,cb = pretrained(dls),JoCorCallback(k=2)
    learn.fit(1, 1e-3, cbs=cb)
    barred = np.flatnonzero(cb.evidence.barred.cpu() >= 0)
    names = [dls.vocab[i] for i in dls.noise.true[barred]]
    changed = barred[dls.noise.flipped[barred]]
    rows = pd.DataFrame(dict(position=barred, predicted_label=names)).query('position in @changed')
    before = cb.items.kept.cpu()[changed]
    learn.dls = cleaned(dls, rows, 'relabel')
    learn.fit(2, 1e-3, cbs=cb)
    assert not before.any() and cb.evidence.told is None # how many were wrong before says nothing now
    assert (cb.items.kept.cpu()[changed] > 0).float().mean() > .8

@pytest.mark.parametrize('tau', (0., .05))
def test_no_more_is_barred_than_the_user_says_is_wrong(dls, tau):
    learn,cb = pretrained(dls),JoCorCallback(k=2, forget_rate=tau)
    learn.fit(1, 1e-3, cbs=cb)
    assert int((cb.evidence.barred >= 0).sum()) == np.ceil(tau*len(dls.train_ds))

def test_a_network_that_the_learner_has_trained_is_not_looked_at(dls, looks):
    learn = pretrained(dls)
    learn.fit(1, 1e-3)
    with pytest.warns(UserWarning, match='has trained its model before'): learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    assert not looks

def test_an_audit_that_has_learned_nothing_bars_nothing(dls, monkeypatch):
    monkeypatch.setattr(LabelAudit, 'follow', False)
    monkeypatch.setattr('fastai_jocor.find._follow', lambda *_: False)
    assert look.first_look(pretrained(dls)) is None

@pytest.mark.parametrize('whole', (True,False))
def test_a_body_that_was_trained_is_known_by_its_head(dls, whole):
    learn = pretrained(dls) if whole else as_pretrained(vision_learner(dls, resnet18, pretrained=False))
    learn.unfreeze()
    learn.fit(6, 1e-3)
    learn.freeze()
    assert look.is_pretrained(learn) # fastai has cleared the optimizer's state
    assert look.first_look(learn) is None

def test_the_only_item_of_a_class_is_not_barred(monkeypatch):
    learn = digits(noise=Symmetric(.3))
    given = torch.as_tensor(given_labels(learn.dls.train))
    few = (given == 3).nonzero()[10:,0]
    given[few] = 4 # what the look has seen; ten labels of class 3 are left
    known = NoiseEstimate(.9, .9, .9, 0., True, .2, 1.)
    monkeypatch.setattr(JoCorCallback, 'first_look', staticmethod(lambda learn: (torch.ones(len(given)), given, known)))
    learn.fit(1, 1e-3, cbs=(cb := JoCorCallback(k=2)))
    assert (cb.evidence.barred[given == 3] == -1).all() and (cb.evidence.barred[given == 5] == 5).any()

def test_what_a_look_has_told_is_plain(dls, tmp_path):
    cb = JoCorCallback(k=2)
    pretrained(dls).fit(1, 1e-3, cbs=cb)
    torch.save(cb.state_dict(), tmp_path/'state.pth')
    again = torch.load(tmp_path/'state.pth', weights_only=True)
    assert again['evidence']['known']['rate'] == cb.evidence.known.rate > .1

def test_a_barred_label_is_no_vote(dls):
    cb,seen = JoCorCallback(k=2, plus='votes'),[]
    split = cb.weigh._with_votes
    def watch(shown, losses, times, usable):
        def noted(log_p, mean, cut):
            e = cb.learn.selection.evidence
            vote = e.barred[cb.learn.selection.idx].clamp_min(0) # as if all peers surely voted for barred labels
            return vote, torch.ones_like(vote, dtype=torch.bool)
        with pytest.MonkeyPatch.context() as m:
            m.setattr('fastai_jocor.weigh.common_votes', noted)
            m.setattr('fastai_jocor.weigh.split_with_votes', lambda times, weights: (
                seen.append(weights[cb.learn.selection.evidence.barred[cb.learn.selection.idx] >= 0]),
                torch.cat([times, weights]))[1])
            return split(shown, losses, times, usable)
    cb.weigh._with_votes = watch
    pretrained(dls).fit(3, 1e-3, cbs=cb)
    weights = torch.cat(seen)
    assert len(weights) and not weights.any()

def test_layers_that_another_callback_has_frozen_stay_so(dls):
    class Freeze(Callback):
        def before_train(self):
            for m in self.model.modules():
                if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    learn = pretrained(dls)
    cb,freeze = JoCorCallback(k=2),Freeze()
    bn = []
    class Watch(Callback):
        order = 20
        def before_batch(self):
            if self.training and not bn:
                bn.extend(m.training for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    learn.fit(1, 1e-3, cbs=[cb, freeze, Watch()])
    assert len(bn) == 40 and not any(bn) and cb.evidence.barred is not None

def judged(hard, noise, n=2000, C=4, seed=0):
    "A judgement by peers that know how probable each class is; the smaller `hard`, the surer they are"
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([hard]*C, n)
    true = (p.cumsum(-1) < rng.random((n,1))).sum(-1).clip(0, C-1)
    given = np.where(rng.random(n) < noise, (true+rng.integers(1, C, n))%C, true)
    said = np.log(p+1e-9)[None]+.1*rng.standard_normal((3,n,C))
    return Judgement(said-np.log(np.exp(said).sum(-1, keepdims=True)), rng.integers(0, 3, n), given)

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('hard', (.05,.2,.5))
def test_hard_items_with_right_labels_do_not_count(hard, seed):
    j = judged(hard, 0., seed=seed)
    assert j.sure_rate < .05 and (hard < .5 or j.rate > .15)

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('hard', (.05,.2,.5))
@pytest.mark.parametrize('noise', (.3,.5))
def test_wrong_labels_count_however_hard_the_items_are(hard, noise, seed):
    j = judged(hard, noise, seed=seed)
    assert noise-.08 < j.sure_rate < noise+.2 and j.sure_rate <= j.rate

def test_too_few_labels_to_tell_hard_items(monkeypatch):
    monkeypatch.undo()
    assert judged(.05, .3, n=899).sure_rate is None
    assert judged(.05, .3, n=900).sure_rate > .2

def test_what_a_look_has_told_counts_in_the_list_too(monkeypatch):
    learn = digits(noise=Symmetric(.3))
    given = torch.as_tensor(given_labels(learn.dls.train))
    known = NoiseEstimate(.1, .1, .1, 0., True, .05, .4)
    found = torch.zeros(len(given)),given,known
    monkeypatch.setattr(JoCorCallback, 'first_look', staticmethod(lambda learn: found))
    learn.fit_one_cycle(8, 1e-2, cbs=(cb := JoCorCallback(k=3)))
    expected = cb.expected_wrong()
    assert abs(expected['expected']/expected['n']-.1) < .01
