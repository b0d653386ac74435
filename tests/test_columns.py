"Given labels from a column of a table, on a folder of Noisy Imagenette's layout."
import numpy as np, pandas as pd, pytest
from fastai.vision.all import (ColReader, ColSplitter, DataBlock, ImageBlock, IndexSplitter, PILImage,
                               TransformBlock)
from fastai_jocor.all import ColumnLabels, NoisyCategoryBlock

WNIDS = np.array(['n01440764','n02102040','n02979186','n03000684'])
RATES = 0,1,5,25,50

@pytest.fixture
def imagenette(tmp_path):
    "Pictures and `noisy_imagenette.csv`, of which labels are wrong in the training set alone"
    rng,rows = np.random.default_rng(0),[]
    for i in range(120):
        true,valid = WNIDS[i%4],i%5 == 0
        path = f"{'val' if valid else 'train'}/{true}/{true}_{i}.JPEG"
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        PILImage.create(rng.integers(0, 255, (9,8,3), dtype=np.uint8)).save(tmp_path/path)
        given = {f'noisy_labels_{r}': true if valid or rng.random() > r/100 else rng.choice(WNIDS) for r in RATES}
        rows.append(dict(path=path, **given, is_valid=valid))
    pd.DataFrame(rows).to_csv(tmp_path/'noisy_imagenette.csv', index=False)
    return tmp_path

def loaders(path, df, rate=50, items=None):
    noise = ColumnLabels(df, f'noisy_labels_{rate}', 'noisy_labels_0')
    block = DataBlock((ImageBlock, NoisyCategoryBlock(noise)), get_x=ColReader('path', pref=path),
                      get_y=ColReader('noisy_labels_0'), splitter=ColSplitter('is_valid'))
    return block.dataloaders(df if items is None else items, bs=8, num_workers=0)

@pytest.mark.parametrize('rate', RATES)
def test_a_folder(imagenette, rate):
    df = pd.read_csv(imagenette/'noisy_imagenette.csv')
    dls = loaders(imagenette, df, rate)
    train,valid = df[~df.is_valid],df[df.is_valid]
    given = [dls.vocab[int(y)] for _,y in dls.train_ds]
    assert given == train[f'noisy_labels_{rate}'].tolist() and list(dls.vocab) == WNIDS.tolist()
    assert [dls.vocab[int(y)] for _,y in dls.valid_ds] == valid.noisy_labels_0.tolist()
    wrong = (train[f'noisy_labels_{rate}'] != train.noisy_labels_0).to_numpy()
    assert np.array_equal(dls.noise.flipped, wrong) and wrong.any() == (rate > 0)
    assert dls.noise.rate == pytest.approx(wrong.mean())

def test_some_rows_in_another_order(imagenette):
    df = pd.read_csv(imagenette/'noisy_imagenette.csv')
    some = df.sample(60, random_state=1)
    dls = loaders(imagenette, df, items=some)
    assert [dls.vocab[int(y)] for _,y in dls.train_ds] == some[~some.is_valid].noisy_labels_50.tolist()

def test_rows_named_by_text(imagenette):
    df = pd.read_csv(imagenette/'noisy_imagenette.csv').set_index('path', drop=False)
    noise = ColumnLabels(df, 'noisy_labels_50', 'noisy_labels_0')
    y = [WNIDS.tolist().index(o) for o in df.noisy_labels_0]
    assert WNIDS[noise.corrupt(y, WNIDS, keys=list(df.index))].tolist() == df.noisy_labels_50.tolist()
    assert noise.transition(WNIDS) == pytest.approx(pd.crosstab(df.noisy_labels_0, df.noisy_labels_50,
                                                                normalize='index').to_numpy())

def test_labels_that_are_numbers():
    df = pd.DataFrame(dict(given=[0,1,1,2], true=[0,1,2,2]))
    assert ColumnLabels(df, 'given', 'true').corrupt([0,1,2,2], 3).tolist() == [0,1,1,2]
    with pytest.raises(ValueError, match="the table holds '2', not among the 2 classes"):
        ColumnLabels(df, 'given', 'true').corrupt([0,1,1,1], 2)

@pytest.mark.parametrize('types', [{}, dict(true=float), dict(true=float, human=float), dict(true=object)])
def test_whole_numbers_in_a_table_of_numbers(types):
    "A row of a table of numbers has floats, so that the vocabulary is 0.0, 1.0 and so on"
    true = np.random.default_rng(0).integers(0, 4, 400)
    human = (true + (np.arange(400)%5 == 0))%4
    df = pd.DataFrame(dict(x=np.arange(400.), true=true, human=human)).astype(types)
    noise = ColumnLabels(df, 'human', 'true')
    assert noise.rate == .2
    block = DataBlock((TransformBlock, NoisyCategoryBlock(noise)), get_x=ColReader('x'), get_y=ColReader('true'),
                      splitter=IndexSplitter(range(50)))
    ds = block.datasets(df)
    assert [float(ds.vocab[int(y)]) for _,y in ds.train] == human[50:].tolist()
    assert noise.transition(ds.vocab) == pytest.approx(noise.transition(4))

def test_names_that_are_written_as_they_are_come_first():
    df = pd.DataFrame(dict(given=['1','1.0','2'], true=['1','1.0','1']))
    assert ColumnLabels(df, 'given', 'true').corrupt([0,1,0], ['1','1.0','2']).tolist() == [0,1,2]

def test_what_does_not_fit():
    df = pd.DataFrame(dict(given=list('abba'), true=list('abab')))
    noise = ColumnLabels(df, 'given', 'true')
    others = "1 of 2 items have another label in column 'true'"
    for y,keys,error in (([0], [4], 'such as 4'), ([1,1], [0,1], others)):
        with pytest.raises(ValueError, match=error): noise.corrupt(y, ['a','b'], keys=keys)
    for cols,error in ((('givn','true'), "did you mean 'given'"), (('given','x'), "it has 'given', 'true'")):
        with pytest.raises(ValueError, match=error): ColumnLabels(df, *cols)
    with pytest.raises(ValueError, match='1 of 4 labels in label_col'):
        ColumnLabels(df.assign(given=['a',None,'b','a']), 'given', 'true')
    with pytest.raises(ValueError, match='index of df is not'): ColumnLabels(pd.concat([df, df]), 'given', 'true')
