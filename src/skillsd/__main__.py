from skillsd.cli.app import main

main()
