"""Importing this leaves a second thread running, as an eager library would."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
