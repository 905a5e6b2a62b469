"""One training run, from settings to a folder that em-serve can serve.

config.json, *.safetensors, ...   the kept weights (or the adapter) and the tokenizer, as em-serve loads them
checkpoints/                      the states to resume from, with the optimizer's
run.json, run.md                  settings, data, curves, why it ended (em_train/run_report.py)
"""

from accelerate.utils import set_seed

from em_train import checkpoints, data, trainers
from em_train.model import check_base_can_load, load
from em_train.run_report import RunReport
from em_train.settings import TrainSettings


def run(settings: TrainSettings) -> str:
    """Train, write the results into `settings.out`, and return why the training ended.

    Raises:
        InputError: if a setting or the data cannot be used; no weights have been changed then.
        OSError: if the disk fails; what had been written before is complete.
    """
    check_base_can_load(settings)
    trainers.check_reporter(settings)
    checkpoint = checkpoints.prepare_folder(settings)
    prompts, rows = data.read(settings)
    tokenizer, model = load(settings)
    trainer = trainers.build_trainer(settings, model, tokenizer, prompts, rows)
    set_seed(settings.seed, device_specific=True)  # processes must sample differently
    report = RunReport(settings, prompts, rows, trainer)
    if trainer.is_world_process_zero():
        report.write(settings.out)
    with checkpoints.write_errors_as_oserror(settings):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(str(settings.out))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(settings.out)
        report.write(settings.out, ended=True)
    trainer.accelerator.end_training()
    return report.ended
