"What audits and callbacks must not say: nothing was learned, too little is known, items are not in the training set."
import random, warnings, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (accuracy, CategoryBlock, DataBlock, ImageBlock, Learner, RandomSplitter, Resize,
    resnet18, set_seed, vision_learner)
from fastai_jocor import features
from fastai_jocor.all import audit_labels, cleaned, digits_dls, JoCorCallback, jocor_mlp
from fastai_jocor.features import body_of
from fastai_jocor.interval import beats_chance
from fastai_jocor.judge import Judgement
from fastai_jocor.trust import labels_follow
from learners import quiet, tensors

def digits_learner(**kwargs):
    set_seed(0)
    return quiet(Learner(digits_dls(**kwargs), jocor_mlp(10, 64), metrics=accuracy))

# --- what the audit must not say

def noise_only(folder, n=600):
    "Pictures whose labels have nothing to do with them"
    set_seed(0)
    names = np.random.default_rng(0).permutation([f'c{i%10}' for i in range(n)])
    images = np.random.default_rng(1).integers(0, 255, (n,8,8,3), dtype=np.uint8)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: list(range(n)), get_x=lambda i: images[i],
                      get_y=lambda i: names[i], splitter=RandomSplitter(.1, seed=0), item_tfms=Resize(32))
    dls = block.dataloaders(folder, bs=16, num_workers=0)
    return images,vision_learner(dls, resnet18, pretrained=False, path=folder)

def test_labels_that_have_nothing_to_do_with_the_items_are_no_knowledge(tmp_path):
    x = np.random.default_rng(0).normal(size=(900,64))
    y = np.random.default_rng(1).integers(0, 10, 900)
    assert not labels_follow(x, y) and labels_follow(x, (x[:,0] > 0).astype(int))
    assert labels_follow(x[:300], (np.arange(300) == 7).astype(int)) # one item of a class: nothing can be said
    _,learn = noise_only(tmp_path)
    audit = audit_labels(learn, progress=False, folder=tmp_path)
    assert not audit.learned and not len(audit.suspects())

def test_what_a_getter_reads_is_part_of_the_key_of_features(tmp_path):
    images,learn = noise_only(tmp_path, 60)
    body,dl = body_of(learn.model),learn.dls.train
    before = features.feature_key(body, dl)
    assert features.feature_key(body, dl) == before
    images[int(dl.items[3])] = 0
    assert features.feature_key(body, dl) != before

def test_a_rare_class_is_no_reason_to_say_nothing():
    rng = np.random.default_rng(0)
    rare = (np.arange(3000) < 110).astype(int)
    given = np.where(rng.random(3000) < .2, 1-rare, rare)
    x = rng.normal(size=(3000,5))+6*rare[:,None]
    assert labels_follow(x, given) and beats_chance(rare, given) and not beats_chance(0*rare, given)

def test_peers_that_hardly_agree_with_hidden_labels_are_not_trusted():
    rng = np.random.default_rng(0)
    given,hidden = rng.integers(0, 10, 3000),np.arange(3000) % 3
    said = np.full((3,3000,10), -5., np.float32)
    vote = np.where(rng.random(3000) < .1, given, rng.integers(0, 10, 3000))
    said[:,np.arange(3000),vote] = 0
    j = Judgement(said, hidden, given)
    assert j.learned and .05 < j.kappa < .15 and not j.trusted

def test_the_seed_alone_decides_on_an_audit_without_a_body():
    def suspects():
        learn = digits_learner()
        random.seed() # as in a new process
        learn.dls.train.rng = random.Random(random.randint(0, 2**32-1))
        return audit_labels(learn, epochs=3, progress=False).table.p_wrong
    np.testing.assert_array_equal(suspects(), suspects())

def test_classes_that_were_not_learned_make_an_audit_untrusted():
    audit = audit_labels(digits_learner(), epochs=5, progress=False)
    assert audit.trusted
    audit.cb.estimate.trusted = False # as `LostClasses` does
    assert not audit.trusted

def test_suspects_of_the_validation_set_leave_the_training_set_alone():
    dls = digits_learner().dls
    rows = pd.DataFrame(dict(part=['valid','train','valid'], position=[5,6,7], predicted_label='1'))
    with pytest.warns(UserWarning, match='2 of the 3 suspects are not in the training set'): new = cleaned(dls, rows)
    assert len(new.train.dataset) == len(dls.train.dataset)-1

def test_few_hidden_labels_give_a_short_list_and_a_warning():
    learn,cb = digits_learner(valid=.83),JoCorCallback(k=3)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
    assert cb.certainty is None
    cb.estimate.high = .01
    with pytest.warns(UserWarning, match='fewer than 100 labels were hidden'): s = cb.suspects()
    assert 0 < len(s) <= 4

@pytest.mark.parametrize('spread,noise,hard', [(1.,0.,True), (.4,.3,False), (.4,0.,False)])
def test_hard_items_are_not_called_wrong_without_a_word(spread, noise, hard):
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 4000)
    x = np.eye(4)[true]+spread*rng.normal(size=(4000,4))
    y = np.where(rng.random(4000) < noise, (true+rng.integers(1, 4, 4000))%4, true)
    set_seed(0)
    learn = tensors(torch.tensor(x).float(), torch.tensor(y), jocor_mlp(4, 4), bs=128)
    audit = audit_labels(learn, epochs=8, progress=False)
    assert (audit.problem is not None) == hard and (audit.expected_wrong()['low'] == 0 or noise)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        listed = audit.suspects()
    assert any('probably hard' in str(o.message) for o in said) == hard
    assert ('probably hard' in str(audit)) == hard == ('warning' in listed.attrs['summary'])
