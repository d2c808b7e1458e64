from lightning_dfd.cli import main

main()
