# Images: of the environment for training and for prediction, and with a trained run. A part of the Makefile.

DOCKER ?= docker
IMAGE = dida-tools
# The trained run that goes into an image, or predicts.
RUN ?=
# The image that runs: train, predict, or the one with the run.
IMAGE_TAG ?= $(if $(RUN),$(RUN),train)
# Further packages of a model or routine: make docker-build PACKAGES="monai pytorch-ignite".
PACKAGES ?=
BASE_IMAGE ?=
GPUS ?= $(shell nvidia-smi >/dev/null 2>&1 && echo --gpus all)

.PHONY: docker-build docker-run

BUILD = $(DOCKER) build --build-arg TORCH=$(TORCH) --build-arg PACKAGES="$(PACKAGES)" \
	$(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE))

ifeq ($(RUN),)
docker-build:  ## build the images dida-tools:predict and :train; with RUN=NAME, one that predicts with this run
	$(BUILD) --target predict --tag $(IMAGE):predict .
	$(BUILD) --target train --tag $(IMAGE):train .
else
docker-build:
	@test -f weights/$(RUN)/best.pt -a -f logs/$(RUN)/config.json || { \
		echo "There is no weights/$(RUN)/best.pt with logs/$(RUN)/config.json: give the full NAME of a run in logs/."; exit 1; }
	$(BUILD) --target run --build-arg RUN=$(RUN) --tag $(IMAGE):$(RUN) .
endif

# An image with a run has its own weights. --shm-size: for the workers that load data.
docker-run: MOUNTED = $(if $(RUN),data predictions,data logs predictions weights)
docker-run:  ## train in the image; ARGS="EPOCHS=3"; predict with RUN=NAME ARGS="-i data/new -o predictions"
	@mkdir -p $(MOUNTED)
	$(DOCKER) run --rm $$(test -t 0 && echo --interactive --tty) --user "$$(id -u):$$(id -g)" $(GPUS) --shm-size 2g \
		$(foreach folder,$(MOUNTED),--volume "$(CURDIR)/$(folder):/project/$(folder)") $(IMAGE):$(IMAGE_TAG) $(ARGS)
