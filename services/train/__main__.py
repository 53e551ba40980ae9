from services.train.driver import main

main()
