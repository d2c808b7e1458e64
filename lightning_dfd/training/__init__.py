"""The LightningModule, its settings, optimizers and learning-rate schedules."""
